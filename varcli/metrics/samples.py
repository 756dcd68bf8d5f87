"""Samples as a user hands them over: a folder, an npz file, images in memory, or an iterator of them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from varcli.artifacts.manifest import Manifest
from varcli.artifacts.verify import is_artifact, read_manifest
from varcli.data.paths import escape_path
from varcli.data.samples import NPZ_NAME, SAMPLES_KIND, sample_pairs
from varcli.errors import ArtifactError
from varcli.metrics.npz import SPATIAL_KEYS, STATISTICS_KEYS, open_npz
from varcli.metrics.sources import ImageSource, from_batches, from_folder, from_npz, from_tensor, require_unchanged
from varcli.metrics.statistics import Statistics


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Samples before they are read."""

    images: ImageSource | None  # None where a file holds statistics alone
    statistics: Statistics | None = None  # of such a file
    spatial_statistics: Statistics | None = None
    info: dict[str, Any] | None = None  # of the manifest that `varcli sample` wrote
    has_unused_statistics: bool = False  # the file holds statistics beside its images
    shown: str  # path, printable

    @property
    def side(self) -> tuple[int, int] | None:
        """Height and width of the images."""
        return None if self.images is None else (self.images.height, self.images.width)


def open_samples(samples: Path | Tensor | Iterable[Tensor], stack: contextlib.ExitStack) -> Samples:
    """Open a folder of images, an npz file, uint8 (N, 3, H, W), or an iterator of such batches, which is read once here.

    stack: holds temporary files.

    Raises ArtifactError for a path that is none of these, and what `from_folder` and `open_npz` raise.
    """
    if isinstance(samples, Tensor):
        source = from_tensor(samples)
        return Samples(images=source, shown=source.shown)
    if not isinstance(samples, (str, Path)):
        source = from_batches(samples, stack)
        return Samples(images=source, shown=source.shown)
    path = Path(samples)
    shown = escape_path(str(path))
    if path.is_dir():
        manifest = read_manifest(path) if is_artifact(path) else None
        if manifest is None or "indices" not in manifest.info:
            return Samples(images=from_folder(path), info=None if manifest is None else manifest.info, shown=shown)
        require_unchanged(path, manifest)
        path = path / NPZ_NAME  # the folder has no files of single images
    if not path.is_file():
        raise ArtifactError(f"there are no samples `{shown}`", "pass a folder of images or an npz file")
    if path.suffix.lower() != ".npz":
        raise ArtifactError(f"`{shown}` is a file, but samples are a folder of images or an npz file")
    file = open_npz(path)
    images = from_npz(file)
    if images is not None:
        manifest = _manifest_beside(path)
        if manifest is not None:
            images = _with_classes(images, manifest)
        # the ADM evaluator would use stored statistics and ignore the images beside them
        info = None if manifest is None else manifest.info
        return Samples(images=images, info=info, shown=shown, has_unused_statistics=STATISTICS_KEYS[0] in file.headers)
    return Samples(
        images=None,
        statistics=file.read_statistics(STATISTICS_KEYS),
        spatial_statistics=file.read_statistics(SPATIAL_KEYS),
        shown=shown,
    )


def _manifest_beside(path: Path) -> Manifest | None:
    """Return the manifest that `varcli sample` wrote of an npz file, if this is that file still, as far as its size tells."""
    if path.name != NPZ_NAME or not is_artifact(path.parent):
        return None
    manifest = read_manifest(path.parent)
    entry = manifest.files.get(NPZ_NAME)
    is_same = manifest.kind == SAMPLES_KIND and entry is not None and entry.size == path.stat().st_size
    return manifest if is_same else None


def _with_classes(images: ImageSource, manifest: Manifest) -> ImageSource:
    """Add the classes that a manifest tells; the order is then by class, which is no order for an Inception Score."""
    labels = np.array([class_index for class_index, _ in sample_pairs(manifest)])
    if len(labels) != images.count:
        return images
    names = manifest.info.get("classes")
    is_named = isinstance(names, list) and all(isinstance(name, str) for name in names)
    return replace(images, labels=labels, classes=tuple(names) if is_named else None, has_order=False)
