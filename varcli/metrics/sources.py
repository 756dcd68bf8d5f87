"""Sets of images as metrics read them: a folder, a `varcli sample` folder, an image tree, an npz file, or a tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from varcli.artifacts.verify import is_artifact, read_manifest, verify_folder
from varcli.data.decode import UnusableImage, load_image
from varcli.data.defaults import default_decode
from varcli.data.images import ImageTree, decode_images, typical_side
from varcli.data.paths import escape_path
from varcli.data.samples import SAMPLES_KIND, is_unfinished, list_images, read_images, sample_class
from varcli.errors import DataError, IntegrityError, ShapeError
from varcli.metrics.npz import NpzFile
from varcli.shapes import check_shape

_WORKERS_FROM = 2048  # images; below it, starting processes takes longer than decoding


@dataclass(frozen=True, kw_only=True)
class ImageSource:
    """A set of images of one size, read in order, as often as needed."""

    shown: str  # its path or name, printable
    count: int  # N
    height: int
    width: int
    batches: Callable[[int], Iterator[Tensor]]  # batch size -> uint8 (n, 3, H, W)
    has_order: bool = False  # whether the file's order is the one that published Inception Scores use
    labels: np.ndarray | None = None  # int (N,), indices into classes
    classes: tuple[str, ...] | None = None
    num_jpeg: int = 0  # images stored as JPEG
    preparation: str = "as they are"  # what happens to the images on disk

    def describe(self) -> dict[str, object]:
        """Return the JSON object that reports show."""
        return {
            "path": self.shown,
            "count": self.count,
            "height": self.height,
            "width": self.width,
            "preparation": self.preparation,
        }


def from_folder(folder: Path) -> ImageSource:
    """Open a folder of images of one size; for one that `varcli sample` wrote, exactly the images its manifest names.

    Raises DataError without images, IntegrityError if a sample differs from the manifest, ArtifactError for a folder of
    another kind.
    """
    labels = classes = None
    if is_artifact(folder):
        manifest = read_manifest(folder, SAMPLES_KIND)
        problems = verify_folder(folder, manifest)
        if problems:
            raise IntegrityError(
                f"`{escape_path(str(folder))}` differs from its manifest: {problems[0]}"
                + (f" and {len(problems) - 1} more" if len(problems) > 1 else ""),
                "delete the changed images and run `varcli sample` again",
            )
        paths = [
            path for path in list_images(folder) if path.name in manifest.files and sample_class(path.name) is not None
        ]
        labels = np.array([sample_class(path.name) for path in paths])
        names = manifest.info.get("classes")
        if isinstance(names, list) and all(isinstance(name, str) for name in names):
            classes = tuple(names)
    elif is_unfinished(folder):
        raise DataError(f"the samples in `{escape_path(str(folder))}` are not finished", "run `varcli sample` again")
    else:
        paths = list_images(folder)
    width, height = _first_size(paths[0])
    return ImageSource(
        shown=escape_path(str(folder)),
        count=len(paths),
        height=height,
        width=width,
        batches=lambda batch_size: read_images(paths, batch_size),
        labels=labels,
        classes=classes,
        num_jpeg=sum(_is_jpeg(path) for path in paths),
    )


def from_tree(
    tree: ImageTree, split: str, size: int, indices: np.ndarray | None = None, shown: str | None = None
) -> ImageSource:
    """Open real images as training sees them: used whole where they have `size`, else cut in the centre.

    indices: positions in the split; None takes all. shown: name of the tree for reports. Raises DataError if the images
    are smaller than `size`; so does reading, for an image that cannot be used.
    """
    chosen = tree.splits[split]
    shown = f"{shown or escape_path(str(tree.root))}, {split} images"
    side = typical_side(tree.root, chosen)
    if side < size:
        raise DataError(
            f"{shown}: these real images are mostly smaller ({side} px) than the samples ({size} px)",
            "enlarged images are blurred, and no measure: pass larger ones, or sample at their size",
        )
    indices = np.arange(len(chosen)) if indices is None else indices
    # "val" is what is never cut at random
    config = default_decode(ImageTree(tree.root, tree.classes, {"val": chosen}), size)["val"]

    def batches(batch_size: int) -> Iterator[Tensor]:
        workers = 0 if len(indices) < _WORKERS_FROM else None
        for batch in decode_images(tree, split, config, indices, workers=workers, batch_size=batch_size):
            if batch.skipped:
                path, reason = batch.skipped[0]
                raise DataError(
                    f"`{escape_path(str(tree.root / path))}`: {reason}",
                    "remove it: a metric over fewer images is another number",
                )
            yield batch.images

    whole = (
        "as they are"
        if config.crop == "none"
        else f"centre crops of {size} px, shorter edge at {round(size * config.resize_ratio)}"
    )
    paths = [] if chosen.pixels is not None else [tree.root / chosen.paths[index] for index in indices]
    return ImageSource(
        shown=shown,
        count=len(indices),
        height=size,
        width=size,
        batches=batches,
        labels=chosen.labels[indices],
        classes=tree.classes,
        num_jpeg=sum(_is_jpeg(path) for path in paths),
        preparation=whole,
    )


def from_npz(file: NpzFile) -> ImageSource | None:
    """Open the images of an npz file, or return None if it has none."""
    shape = file.image_shape
    if shape is None:
        return None
    return ImageSource(
        shown=escape_path(str(file.path)),
        count=shape[0],
        height=shape[1],
        width=shape[2],
        batches=file.read_images,
        has_order=True,
    )


def from_tensor(images: Tensor, labels: np.ndarray | None = None) -> ImageSource:
    """Use images in memory, uint8 (N, 3, H, W). Raises ShapeError for others."""
    check_shape("images", images, ("N", 3, "H", "W"))
    if images.dtype != torch.uint8 or not len(images):
        raise ShapeError(f"images must be uint8 (N, 3, H, W), but are {images.dtype} {tuple(images.shape)}")
    return ImageSource(
        shown="images in memory",
        count=len(images),
        height=images.shape[2],
        width=images.shape[3],
        batches=lambda batch_size: iter(images.cpu().split(batch_size)),
        labels=labels,
    )


def _first_size(path: Path) -> tuple[int, int]:
    try:
        return load_image(path)[0].size
    except UnusableImage as reason:
        raise DataError(f"`{escape_path(str(path))}`: {reason}", "remove it, or make it again") from None


def _is_jpeg(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read(3) == b"\xff\xd8\xff"
    except OSError:
        return False  # reported when it is read
