"""Image folders: what classes, splits and images one holds, found without reading an image."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from varcli.data.decode import SUFFIXES, UnusableImage, load_image
from varcli.data.idx import is_idx_folder, read_idx
from varcli.data.paths import escape_path
from varcli.data.runs import require_no_artifact
from varcli.data.stream import DecodedBatch, decode_images
from varcli.data.views import DecodeConfig
from varcli.errors import DataError
from varcli.progress import counted

__all__ = [
    "DecodeConfig",
    "DecodedBatch",
    "ImageTree",
    "Split",
    "decode_images",
    "describe_enlarging",
    "load_image",
    "open_images",
    "typical_side",
]

_NUM_PROBED = 16  # images looked at by `typical_side`

_SPLIT_FOLDERS = {"train": "train", "val": "val", "valid": "val", "validation": "val"}
_IDX_PADDING = 16  # IDX images are padded to a multiple of this, so that 28 becomes 32


@dataclass(frozen=True)
class Split:
    """The images of one split, by class and then by path."""

    paths: tuple[str, ...]  # relative to the tree's root, with "/"; for IDX "<split>/<number>"
    labels: np.ndarray  # int32 (N,), indices into the tree's classes
    pixels: np.ndarray | None = field(
        default=None, repr=False
    )  # uint8 (N, H, W) where they came with the listing (IDX)

    def __len__(self) -> int:
        return len(self.paths)


@dataclass(frozen=True)
class ImageTree:
    """What `open_images` found under `root`."""

    root: Path
    classes: tuple[str, ...]  # sorted folder names; a class keeps its number when it has no images
    splits: dict[str, Split]  # "train" first, then "val" if there is one
    skipped: tuple[tuple[str, str], ...] = ()  # (path, reason): links that lead out, FIFOs, ...; no image was read yet
    num_ignored: int = 0  # files that do not claim to be images

    @property
    def num_images(self) -> int:
        """Images of all splits."""
        return sum(len(split) for split in self.splits.values())

    @property
    def summary(self) -> str:
        """How many images in how many classes, e.g. "20 images in 1 class"."""
        return f"{counted(self.num_images, 'image')} in {counted(len(self.classes), 'class', 'classes')}"

    def empty_classes(self) -> list[str]:
        """Return the classes without a training image."""
        counts = np.bincount(next(iter(self.splits.values())).labels, minlength=len(self.classes))
        return [name for name, count in zip(self.classes, counts, strict=True) if not count]

    def class_counts(self) -> dict[str, dict[str, int]]:
        """Return the number of images of each class in each split."""
        bins = {
            name: np.bincount(split.labels, minlength=len(self.classes)).tolist() for name, split in self.splits.items()
        }
        return {
            label: {name: counts[index] for name, counts in bins.items()} for index, label in enumerate(self.classes)
        }


def open_images(root: Path, follow_links: bool = False, allow_single_class: bool = False) -> ImageTree:
    """List a folder of images: `{train,val}/<class>/<image>`, `<class>/<image>` (all "train"), or an IDX folder.

    follow_links: use links that lead out of `root`, else they are skipped. allow_single_class: take a folder with one
    class, or with images and no class folder (one class with the folder's name).
    Raises DataError, saying what to do, if there is no image or only one class, if val has classes train has not, or if
    varcli wrote the folder itself, such as samples: their grid, for one, is no image to learn from.
    """
    root = Path(root)
    shown = escape_path(str(root))
    if not root.exists():
        raise DataError(f"there is no folder `{shown}`", "pass a folder with one folder of images for each class")
    if not root.is_dir():
        hint = "unpack the archive first" if root.suffix in (".zip", ".tar", ".gz", ".tgz") else "pass its folder"
        raise DataError(f"`{shown}` is a file, but a folder of images is needed", hint)
    require_no_artifact(root)
    if is_idx_folder(root):
        return _open_idx(root)
    scan = _Scan(root, follow_links)
    classes, found = scan.read()
    num_images = sum(len(paths) for by_class in found.values() for paths in by_class.values())
    if not num_images and scan.loose and allow_single_class:
        classes = (root.resolve().name,)
        found, num_images = {"train": {classes[0]: sorted(scan.loose)}}, len(scan.loose)
    elif scan.loose:
        scan.skipped.extend((path, "not in a class folder") for path in sorted(scan.loose))
    if not num_images:
        raise _no_images(shown, scan)
    if len(classes) < 2 and not allow_single_class:
        raise DataError(
            f"`{shown}` holds one class only (`{escape_path(classes[0])}`), but at least two are needed",
            "pass the folder that holds one folder of images for each class",
        )
    splits = {name: _make_split(by_class, classes) for name, by_class in found.items()}
    return ImageTree(root, classes, splits, tuple(scan.skipped), scan.num_ignored)


class _Scan:
    """One walk over a class-per-folder tree."""

    def __init__(self, root: Path, follow_links: bool) -> None:
        self.root = root
        self.real_root = os.path.realpath(root)
        self.follow_links = follow_links
        self.skipped: list[tuple[str, str]] = []
        self.loose: list[str] = []  # images beside the class folders
        self.num_ignored = 0

    def read(self) -> tuple[tuple[str, ...], dict[str, dict[str, list[str]]]]:
        """Return classes and, for each split, the paths of each class."""
        folders = self._folders("")
        names = [name for name in _SPLIT_FOLDERS if name in folders and self._has_folders(name)]
        if not names:
            found = {"train": {name: self._images(name) for name in folders}}
            return tuple(sorted(folders)), found
        by_split: dict[str, dict[str, list[str]]] = {}
        for folder in names:
            if _SPLIT_FOLDERS[folder] in by_split:
                raise DataError(f"`{escape_path(str(self.root))}` has two validation folders: {', '.join(names[1:])}")
            by_split[_SPLIT_FOLDERS[folder]] = {
                name: self._images(f"{folder}/{name}") for name in self._folders(f"{folder}/")
            }
        classes = sorted(next(iter(by_split.values())))
        for name in sorted(by_split.get("val", {})):
            if name not in classes:
                raise DataError(
                    f"class `{escape_path(name)}` is in val/ but not in train/", "give both the same class folders"
                )
        return tuple(classes), by_split

    def _has_folders(self, folder: str) -> bool:
        """Say whether `folder` holds class folders, so that a class called `train` is not taken for a split."""
        with os.scandir(self.root / folder) as entries:
            return any(_is_folder(entry) and not _is_hidden(entry.name) for entry in entries)

    def _folders(self, prefix: str) -> list[str]:
        folders = []
        for entry in _list(self.root / prefix):
            if _is_hidden(entry.name):
                self.num_ignored += 1
            elif _is_folder(entry):
                if _is_ours(Path(entry.path)):
                    self.num_ignored += 1
                elif self._may_use(entry, prefix + entry.name):
                    folders.append(entry.name)
            elif not _claims_image(entry.name):
                self.num_ignored += 1
            elif self._may_use(entry, prefix + entry.name):
                self.loose.append(prefix + entry.name)
        return folders

    def _images(self, folder: str) -> list[str]:
        """Return all images below a class folder, sorted; deeper folders belong to the same class."""
        paths, pending, visited = [], [folder], set()
        while pending:
            current = pending.pop()
            identity = os.path.realpath(self.root / current)
            if identity in visited:
                continue  # links can make a loop
            visited.add(identity)
            for entry in _list(self.root / current):
                path = f"{current}/{entry.name}"
                if _is_hidden(entry.name):
                    self.num_ignored += 1
                elif _is_folder(entry):
                    if self._may_use(entry, path):
                        pending.append(path)
                elif not _claims_image(entry.name):
                    self.num_ignored += 1
                elif self._may_use(entry, path):
                    paths.append(path)
        return sorted(paths)

    def _may_use(self, entry: os.DirEntry[str], path: str) -> bool:
        """Say whether a folder or file may be used; what may not is noted with the reason."""
        reason = None
        try:
            if entry.is_symlink():
                target = os.path.realpath(entry.path, strict=True)
                inside = target == self.real_root or target.startswith(self.real_root + os.sep)
                if not inside and not self.follow_links:
                    reason = "link out of the folder"
            elif entry.is_file(follow_symlinks=False):
                return True  # the usual case, known without a system call
            if reason is None and not entry.is_dir() and not stat.S_ISREG(entry.stat().st_mode):
                reason = "not a regular file"
        except OSError as error:
            reason = "link in a loop" if error.errno == errno.ELOOP else "link to nothing"
        if reason is not None:
            self.skipped.append((path, reason))
        return reason is None


def typical_side(root: Path, split: Split) -> int:
    """Return the median shorter side, in pixels, of a few images spread over a split; 0 if none of them can be read."""
    sides = [min(size) for size in probe_sizes(root, split)]
    return int(np.median(sides)) if sides else 0


def describe_enlarging(side: int, size: int) -> str | None:
    """Say that images of about `side` pixels are smaller than the `size` they will be cut to; None if they are not."""
    return f"the images are about {side} px and are enlarged to {size} px" if 0 < side < size else None


def probe_sizes(root: Path, split: Split) -> list[tuple[int, int]]:
    """Return (width, height) of a few images spread over a split, those that can be read."""
    if split.pixels is not None:
        return [split.pixels.shape[:0:-1]]
    sizes = []
    for index in np.linspace(0, len(split) - 1, min(_NUM_PROBED, len(split))).astype(int):
        with contextlib.suppress(UnusableImage):  # reported when all are read
            sizes.append(load_image(root / split.paths[index])[0].size)
    return sizes


def _list(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(f"cannot read folder `{escape_path(str(folder))}`: {error.strerror}") from None


def _is_ours(folder: Path) -> bool:
    """Whether varcli wrote a folder, such as codes among the classes that they were made from."""
    try:
        require_no_artifact(folder)
    except DataError:
        return True
    return False


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name in ("Thumbs.db", "desktop.ini", "__MACOSX")


def _claims_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in SUFFIXES


def _make_split(by_class: dict[str, list[str]], classes: tuple[str, ...]) -> Split:
    paths = [path for name in classes for path in by_class.get(name, ())]
    counts = [len(by_class.get(name, ())) for name in classes]
    return Split(tuple(paths), np.repeat(np.arange(len(classes), dtype=np.int32), counts))


def _no_images(shown: str, scan: _Scan) -> DataError:
    if scan.loose:
        return DataError(
            f"`{shown}` holds images but no class folders", "put them into one folder for each class: ROOT/CLASS/IMAGE"
        )
    if scan.skipped:
        path, reason = scan.skipped[0]
        return DataError(
            f"`{shown}` holds no image that may be used: {len(scan.skipped)} were skipped, e.g. "
            f"`{escape_path(path)}`: {reason}",
            "pass the folder that the links lead to, or --follow-links" if "link" in reason else None,
        )
    what = f"{counted(scan.num_ignored, 'file')}, but no image" if scan.num_ignored else "nothing"
    return DataError(
        f"`{shown}` holds {what}", f"pass ROOT with ROOT/CLASS/IMAGE; images end in {', '.join(sorted(SUFFIXES))}"
    )


def _open_idx(root: Path) -> ImageTree:
    classes, arrays = read_idx(root)
    splits = {}
    for name, (pixels, labels) in arrays.items():
        below = [-side % _IDX_PADDING for side in pixels.shape[1:]]
        padding = [(0, 0)] + [(rest // 2, rest - rest // 2) for rest in below]
        splits[name] = Split(
            tuple(f"{name}/{number:05d}" for number in range(len(labels))), labels, np.pad(pixels, padding)
        )
    return ImageTree(root, classes, splits)
