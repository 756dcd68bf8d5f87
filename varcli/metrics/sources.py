"""Sets of images as metrics read them: a folder, a `varcli sample` folder, an image tree, an npz file, or a tensor."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from varcli.artifacts.manifest import Manifest, digest_json, hash_files
from varcli.artifacts.verify import is_artifact, read_manifest, verify_folder
from varcli.data.decode import UnusableImage, load_image
from varcli.data.defaults import default_decode
from varcli.data.images import ImageTree, Split, decode_images, typical_side
from varcli.data.paths import escape_path
from varcli.data.runs import require_no_artifact
from varcli.data.samples import SAMPLES_KIND, list_images, read_images, sample_class
from varcli.data.views import DecodeConfig
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
    read: Callable[[int, int, int, int | None], Iterator[Tensor]]  # start, stop, batch size, workers -> (n, 3, H, W)
    digest: Callable[[], str] | None = None  # a hash of the content, which takes time; None where nothing stays on disk
    has_order: bool = False  # whether the file's order is the one that published Inception Scores use
    labels: np.ndarray | None = None  # int (N,), indices into classes
    classes: tuple[str, ...] | None = None
    num_jpeg: int = 0  # images stored as JPEG
    preparation: str = "as they are"  # what happens to the images on disk
    has_quick_seek: bool = True  # whether reading may begin anywhere without reading all that comes before

    def batches(
        self, batch_size: int, start: int = 0, stop: int | None = None, workers: int | None = None
    ) -> Iterator[Tensor]:
        """Yield images start, ..., stop - 1 (to the end by default) in order, as uint8 (n, 3, H, W).

        workers: processes that decode; None chooses, 0 is this one.
        """
        return self.read(start, self.count if stop is None else stop, batch_size, workers)

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

    Raises DataError without images or for unfinished samples, IntegrityError if a sample differs from the manifest,
    ArtifactError for a folder of another kind.
    """
    labels = classes = None
    hashes: dict[Path, str] = {}
    if is_artifact(folder):
        manifest = read_manifest(folder, SAMPLES_KIND)
        require_unchanged(folder, manifest)
        paths = [
            path for path in list_images(folder) if path.name in manifest.files and sample_class(path.name) is not None
        ]
        labels = np.array([sample_class(path.name) for path in paths])
        hashes = {path: manifest.files[path.name].sha256 for path in paths}
        names = manifest.info.get("classes")
        if isinstance(names, list) and all(isinstance(name, str) for name in names):
            classes = tuple(names)
    else:
        require_no_artifact(folder)
        paths = list_images(folder)
    width, height = _first_size(paths[0])
    return ImageSource(
        shown=escape_path(str(folder)),
        count=len(paths),
        height=height,
        width=width,
        read=_read_files(folder, paths, (width, height)),
        digest=lambda: _digest_files(folder, paths, hashes),
        labels=labels,
        classes=classes,
        num_jpeg=sum(_is_jpeg(path) for path in paths),
    )


def require_unchanged(folder: Path, manifest: Manifest) -> None:
    """Raise IntegrityError if a file of a folder of samples differs from its manifest."""
    problems = verify_folder(folder, manifest)
    if problems:
        raise IntegrityError(
            f"`{escape_path(str(folder))}` differs from its manifest: {problems[0]}"
            + (f" and {len(problems) - 1} more" if len(problems) > 1 else ""),
            "delete the changed images and run `varcli sample` again",
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
    if side < size and chosen.pixels is None:
        raise DataError(
            f"{shown}: these real images are mostly smaller ({side} px) than the samples ({size} px)",
            "enlarged images are blurred, and no measure: pass larger ones, or sample at their size",
        )
    indices = np.arange(len(chosen)) if indices is None else indices
    # "val" is what is never cut at random
    config = default_decode(ImageTree(tree.root, tree.classes, {"val": chosen}), size)["val"]

    def digest() -> str:
        content = (
            _digest_files(tree.root, paths)
            if paths
            else hashlib.sha256(np.ascontiguousarray(chosen.pixels[indices])).hexdigest()
        )
        return digest_json({"content": content, "decode": config.describe()})

    whole = (
        f"enlarged from {side} px"
        if side < size
        else "as they are"
        if config.crop == "none"
        else f"centre crops of {size} px, shorter edge at {round(size * config.resize_ratio)}"
    )
    paths = [] if chosen.pixels is not None else [tree.root / chosen.paths[index] for index in indices]
    return ImageSource(
        shown=shown,
        count=len(indices),
        height=size,
        width=size,
        read=_read_tree(tree, split, config, indices),
        digest=digest,
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
        read=lambda start, stop, batch_size, workers: file.read_images(batch_size, start, stop),
        digest=file.digest_images,
        has_order=True,
        labels=file.read_labels(),
        has_quick_seek=file.has_quick_seek,
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
        read=lambda start, stop, batch_size, workers: iter(images[start:stop].cpu().split(batch_size)),
        labels=labels,
    )


def from_batches(batches: Iterable[Tensor], stack: contextlib.ExitStack) -> ImageSource:
    """Use images that come in batches, uint8 (n, 3, H, W), and are not kept in memory but in a temporary file.

    stack: holds that file, of 3 H W bytes an image. Raises ShapeError for other batches, images of two sizes, or none at
    all, DataError if the disk is full.
    """
    file = stack.enter_context(tempfile.TemporaryFile(prefix="varcli-"))  # noqa: SIM115
    count, shape = 0, None
    for batch in batches:
        source = from_tensor(batch)
        if shape not in (None, (source.height, source.width)):
            raise ShapeError(f"images must have one size, but after {shape} came {(source.height, source.width)}")
        count, shape = count + source.count, (source.height, source.width)
        try:
            file.write(batch.cpu().contiguous().numpy())
            file.flush()
        except OSError as error:
            raise DataError(f"images cannot be kept in `{tempfile.gettempdir()}`: {error.strerror}") from None
    if shape is None:
        raise ShapeError("there are no images: the iterator was empty")
    pixels = np.memmap(file, np.uint8, "c", shape=(count, 3, *shape))
    return replace(from_tensor(torch.from_numpy(pixels)), shown="images from an iterator")


def _read_tree(
    tree: ImageTree, split: str, config: DecodeConfig, indices: np.ndarray
) -> Callable[[int, int, int, int | None], Iterator[Tensor]]:
    """Make the reader of some images of a tree."""

    def read(start: int, stop: int, batch_size: int, workers: int | None) -> Iterator[Tensor]:
        wanted = indices[start:stop]
        if workers is None and len(wanted) < _WORKERS_FROM:
            workers = 0
        for batch in decode_images(tree, split, config, wanted, workers=workers, batch_size=batch_size):
            if batch.skipped:
                path, reason = batch.skipped[0]
                raise DataError(
                    f"`{escape_path(str(tree.root / path))}`: {reason}",
                    "remove it, or make it again: a metric over fewer images is another number",
                )
            yield batch.images

    return read


def _read_files(
    folder: Path, paths: list[Path], size: tuple[int, int]
) -> Callable[[int, int, int, int | None], Iterator[Tensor]]:
    """Make the reader of image files that must all have `size` (width, height)."""

    def read_here(start: int, stop: int, batch_size: int, workers: int | None) -> Iterator[Tensor]:
        return read_images(paths[start:stop], batch_size, size)

    if size[0] != size[1] or len(paths) < _WORKERS_FROM:
        return read_here
    names = tuple(_names(folder, paths))
    tree = ImageTree(folder, ("",), {"val": Split(names, np.zeros(len(names), np.int32))})
    config = DecodeConfig(size=size[0], crop="exact")
    return _read_tree(tree, "val", config, np.arange(len(names)))


def _digest_files(root: Path, paths: list[Path], hashes: Mapping[Path, str] | None = None) -> str:
    """Hash names, order and content of files. hashes: SHA-256 of those that are known already."""
    known = dict(hashes or {})
    missing = [path for path in paths if path not in known]
    try:
        known.update(zip(missing, (entry.sha256 for entry in hash_files(missing)), strict=True))
    except OSError as error:
        raise DataError(f"cannot read `{escape_path(str(error.filename))}`: {error.strerror}") from None
    return digest_json(
        [[escape_path(name), known[path]] for name, path in zip(_names(root, paths), paths, strict=True)]
    )


def _names(root: Path, paths: list[Path]) -> list[str]:
    """Return the paths below `root` as texts, with slashes."""
    prefix = len(os.path.join(root, ""))  # `relative_to` takes longer than hashing
    return [str(path)[prefix:].replace(os.sep, "/") for path in paths]


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
