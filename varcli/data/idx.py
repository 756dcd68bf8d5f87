"""IDX folders: the four files in which MNIST, Fashion-MNIST and their relatives are published."""

from __future__ import annotations

import gzip
import struct
import zlib
from pathlib import Path

import numpy as np

from varcli.data.paths import escape_path
from varcli.errors import DataError

_FILES = {  # split -> names of images and labels, each plain or with .gz
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "val": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
_MAX_BYTES = 4 * 2**30  # what one file may unpack to
_FASHION = (
    *("T-shirt or top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)
"""The labels of Fashion-MNIST (Xiao et al., arXiv:1708.07747), in the order of their numbers."""


def is_idx_folder(root: Path) -> bool:
    """Say whether `root` holds the images file of at least one split."""
    return any(_find(root, images) is not None for images, _ in _FILES.values())


def read_idx(root: Path) -> tuple[tuple[str, ...], dict[str, tuple[np.ndarray, np.ndarray]]]:
    """Read an IDX folder.

    Returns the class names (lines of `classes.txt`; Fashion-MNIST's where the folder is called so; else "0", "1", ...),
    and for each split its images, uint8 (N, H, W), and labels, int32 (N,). Raises DataError if a file is missing,
    damaged, or does not fit the other.
    """
    splits = {}
    for split, (images_name, labels_name) in _FILES.items():
        images_path, labels_path = _find(root, images_name), _find(root, labels_name)
        if images_path is None and labels_path is None:
            continue
        if images_path is None or labels_path is None:
            missing = images_name if images_path is None else labels_name
            raise DataError(
                f"`{escape_path(str(root))}` has no `{missing}` (plain or .gz)", "put the file beside the other one"
            )
        images, labels = _read(images_path, 3), _read(labels_path, 1).astype(np.int32)
        if len(images) != len(labels):
            raise DataError(
                f"`{images_path.name}` holds {len(images)} images, but `{labels_path.name}` {len(labels)} labels"
            )
        if not len(images) or 0 in images.shape:
            raise DataError(f"`{escape_path(str(images_path))}` holds no images")
        splits[split] = (images, labels)
    num_classes = max(int(labels.max()) for _, labels in splits.values()) + 1
    return _class_names(root, num_classes), splits


def _find(root: Path, name: str) -> Path | None:
    return next((path for path in (root / name, root / f"{name}.gz") if path.is_file()), None)


def _read(path: Path, dimensions: int) -> np.ndarray:
    """Read one file of unsigned bytes; the header's sizes decide how much is unpacked."""
    shown = escape_path(str(path))
    damaged = DataError(f"`{shown}` is not a whole IDX file of {dimensions} dimensions", "fetch it again")
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            header = file.read(4 + 4 * dimensions)
            if len(header) < 4 + 4 * dimensions or header[:4] != bytes((0, 0, 8, dimensions)):
                raise damaged
            shape = struct.unpack(f">{dimensions}I", header[4:])
            size = int(np.prod([int(side) for side in shape], dtype=object))
            if size > _MAX_BYTES:
                raise DataError(f"`{shown}` says it holds {size} bytes, more than the {_MAX_BYTES} that are read")
            data = file.read(size + 1)
    except (OSError, EOFError, zlib.error):
        raise damaged from None
    if len(data) != size:
        raise damaged
    return np.frombuffer(data, np.uint8).reshape(shape)


def _class_names(root: Path, num_classes: int) -> tuple[str, ...]:
    listing = root / "classes.txt"
    if listing.is_file():
        names = tuple(line.strip() for line in listing.read_text("utf-8", "replace").splitlines() if line.strip())
        if len(names) < num_classes or len(set(names)) != len(names):
            raise DataError(f"`{escape_path(str(listing))}` must have {num_classes} different names, one a line")
        return names
    if num_classes == len(_FASHION) and "fashion" in str(root.resolve()).casefold():
        return _FASHION
    return tuple(str(number) for number in range(num_classes))
