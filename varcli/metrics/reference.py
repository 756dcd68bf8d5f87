"""What samples are measured against: a folder of real images, an npz, stored statistics, or emoji64."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from varcli.artifacts.manifest import hash_file
from varcli.artifacts.verify import is_artifact
from varcli.data.emoji import EMOJI64_CLASSES, unpack_emoji64
from varcli.data.images import ImageTree, open_images
from varcli.data.paths import escape_path
from varcli.errors import ArtifactError, ConfigError, DataError, closest_names
from varcli.metrics.named_references import NAMED, NUM_IMAGES, NUM_SPATIAL, is_named, named_reference
from varcli.metrics.npz import SPATIAL_KEYS, STATISTICS_KEYS, open_npz
from varcli.metrics.sources import ImageSource, from_folder, from_npz, from_tree
from varcli.metrics.statistics import Statistics
from varcli.progress import OnStep, ignore

EMBEDDED = "emoji64"
"""The reference that comes with varcli."""


@dataclass(frozen=True, kw_only=True)
class Reference:
    """Real images, stored statistics, or both, as the ADM evaluation suite's files have."""

    images: ImageSource | None = None
    statistics: Statistics | None = None  # of pooled features, over a whole data set
    spatial_statistics: Statistics | None = None
    name: str | None = None  # of the tree, printable
    tree: ImageTree | None = None  # where the images are a split of a tree, which may hold more real images
    split: str | None = None  # that split
    sha256: str | None = None  # of an npz file
    record: dict[str, Any] = field(default_factory=dict)  # what an npz file of varcli's says of itself
    shown: str = ""  # path or name, printable

    @property
    def side(self) -> tuple[int, int] | None:
        """Height and width of the images, or of those that the statistics are of; None if a file does not say."""
        if self.images is not None:
            return self.images.height, self.images.width
        recorded = self.record.get("images")
        sides = (recorded.get("height"), recorded.get("width")) if isinstance(recorded, dict) else ()
        return (sides[0], sides[1]) if sides and all(isinstance(side, int) for side in sides) else None

    @property
    def is_published(self) -> bool:
        """Whether this is, as far as its arrays tell, one of the files that published FIDs are measured against."""
        return not self.record and any(
            self.images is not None
            and self.side == (entry.side, entry.side)
            and self.images.count == NUM_IMAGES
            and self.statistics is not None
            and self.spatial_statistics is not None
            and self.spatial_statistics.num_features == NUM_SPATIAL
            for entry in NAMED.values()
        )

    def more_real_images(self, count: int, labels: np.ndarray | None, seed: int = 0) -> ImageSource | None:
        """Return real images that are not in the reference, for the number that perfect samples would get.

        They come from the tree's other split: `count` of them, or one for each of `labels` from the same class as far as
        there are enough. None if there is no other split.
        """
        others = [name for name in self.tree.splits if name != self.split] if self.tree else []
        if not others or self.images is None or self.tree is None:
            return None
        split = self.tree.splits[others[0]]
        order = np.random.default_rng(seed).permutation(len(split))
        if labels is None:
            chosen = order[:count]
        else:
            parts = []
            for label in np.unique(labels):
                parts.append(order[split.labels[order] == label][: int((labels == label).sum())])
            chosen = np.concatenate(parts)
        return from_tree(self.tree, others[0], self.images.width, np.sort(chosen), self.name)


def default_reference(info: Mapping[str, Any] | None, side: tuple[int, int] | None = None) -> str:
    """Return what to measure samples against where the user names nothing.

    info: of the samples' manifest, None without one. side: their height and width. The images that the manifest records,
    if they are still there; emoji64 for samples of its classes; else ImageNet at their size, for a thousand classes or
    where nothing is known of them. Raises ConfigError if none of these fits.
    """
    recorded, classes = (info or {}).get("reference"), tuple((info or {}).get("classes") or ())
    has_record = isinstance(recorded, str) and bool(recorded)
    if has_record and (recorded in (EMBEDDED, *NAMED) or Path(recorded).exists()):
        return recorded
    if classes == EMOJI64_CLASSES:
        return EMBEDDED
    if has_record:
        raise ConfigError(
            f"these samples name the real images `{escape_path(recorded)}`, which are not there",
            "pass --ref with where they are now",
        )
    for name, entry in NAMED.items():
        if side == (entry.side, entry.side) and (info is None or len(classes) in (0, 1000)):
            return name
    raise ConfigError(
        "these samples do not say which real images to compare them with",
        f"pass --ref with a folder of real images, an npz file, or one of {', '.join((EMBEDDED, *NAMED))}",
    )


def open_reference(
    name: str, side: tuple[int, int] | None, stack: contextlib.ExitStack, on_step: OnStep = ignore
) -> Reference:
    """Open what `--ref` names.

    name: "emoji64"; one of `NAMED`, which is fetched if it is not at hand; a folder of images, of which a validation split
    is taken where there is one; a folder that `varcli sample` wrote; or an npz file. side: height and width of the
    samples, None if they are statistics alone. stack: holds temporary files.
    Raises VarcliError children for what is missing, damaged, unsafe, or of another size than the samples.
    """
    path = Path(name)
    if is_named(name):
        path = named_reference(name, on_step)
    if name == EMBEDDED and not path.exists():
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="varcli-"))) / EMBEDDED
        unpack_emoji64(folder)
        reference = _from_tree_folder(folder, side, EMBEDDED)
    elif path.is_dir() and is_artifact(path):
        images = from_folder(path)
        reference = Reference(images=images, shown=images.shown)
    elif path.is_dir():
        reference = _from_tree_folder(path, side, escape_path(name))
    elif path.is_file():
        file = open_npz(path)
        record = file.read_record()
        count = record.get("images", {}).get("count")
        statistics, spatial = (file.read_statistics(keys) for keys in (STATISTICS_KEYS, SPATIAL_KEYS))
        reference = Reference(
            images=from_npz(file),
            statistics=replace(statistics, count=count) if statistics else None,
            spatial_statistics=replace(spatial, count=count) if spatial else None,
            sha256=hash_file(path).sha256,
            record=record,
            shown=escape_path(name),
        )
    else:
        known = (EMBEDDED, *NAMED)
        nearest = closest_names(name, known, count=1) if path.name == name else []
        raise ArtifactError(
            f"there is no reference `{escape_path(name)}`",
            (f"did you mean {nearest[0]}? " if nearest else "")
            + f"pass a folder, an npz file, or one of {', '.join(known)}",
        )
    images = reference.images
    if images is not None and side is not None and (images.height, images.width) != side:
        raise DataError(
            f"the reference images are {images.width} x {images.height} pixels, but the samples are {side[1]} x {side[0]}",
            "both must have one size: resize one of them with care, or sample at the other size",
        )
    return reference


def _from_tree_folder(folder: Path, side: tuple[int, int] | None, shown: str) -> Reference:
    if side is None:
        raise DataError(
            f"`{shown}` is a folder of images, but the samples are statistics alone, which do not say their size",
            "pass an npz file as the reference",
        )
    if side[0] != side[1]:
        raise DataError(f"real images are cut to squares, but the samples are {side[1]} x {side[0]} pixels")
    tree = open_images(folder, allow_single_class=True)
    split = "val" if "val" in tree.splits else next(iter(tree.splits))
    images = from_tree(tree, split, side[0], shown=shown)
    return Reference(images=images, tree=tree, split=split, name=shown, shown=images.shown)
