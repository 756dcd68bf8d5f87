"""Generated images on disk: a folder of PNGs with a grid to look at, and the npz that evaluation suites read.

Folder: `<class index, 4 digits>-<index, 5 digits>.png`, `grid.png`, optionally `samples.npz`, `manifest.json`;
what comes without single files is in `varcli.data.parts`.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from PIL import Image

from varcli import config as configs
from varcli.artifacts.lock import contents_of, hold_folder
from varcli.artifacts.manifest import MANIFEST_NAME, PLAN_NAME, FileEntry, Manifest, hash_file, write_manifest
from varcli.artifacts.verify import read_manifest, read_plan
from varcli.artifacts.write import atomic_path, write_json
from varcli.data.decode import SUFFIXES, UnusableImage, load_image
from varcli.data.paths import escape_path
from varcli.data.png import save_png
from varcli.errors import ArtifactError, ConfigError, DataError, ShapeError

if TYPE_CHECKING:
    from torch import Tensor

SAMPLES_KIND = "samples"
GRID_NAME, NPZ_NAME = "grid.png", "samples.npz"
_OFF = {"files": "png", "fp8": False}  # what settings that are None mean, for errors
_SAMPLE = re.compile(r"(\d{4,})-(\d{5,})\.png")
_GRID_IMAGES, _GRID_ROWS, _GRID_COLUMNS = 64, 16, 8
_NPZ_DATE = (1980, 1, 1, 0, 0, 0)  # the earliest a zip can hold: equal images give equal bytes


def sample_name(class_index: int, index: int) -> str:
    """File name of the `index`-th image of a class."""
    return f"{class_index:04d}-{index:05d}.png"


def sample_class(name: str) -> int | None:
    """Class index in a sample's file name, or None if `name` is not a sample's."""
    match = _SAMPLE.fullmatch(name)
    return int(match[1]) if match else None


def sample_pairs(manifest: Manifest) -> list[tuple[int, int]]:
    """Return (class index, index) of all samples of a folder, in the order of its npz: by class, then by index.

    Raises ArtifactError if the manifest's list of them is damaged.
    """
    matches = filter(None, map(_SAMPLE.fullmatch, manifest.files))
    pairs = [(int(match[1]), int(match[2])) for match in matches]
    try:
        listed = manifest.info.get("indices") or {}
        pairs += [(int(class_index), int(index)) for class_index, indices in listed.items() for index in indices]
    except (TypeError, ValueError, AttributeError):
        raise ArtifactError("the manifest's `indices` of samples are damaged", "draw the samples again") from None
    return sorted(pairs)


def make_grid(images: Tensor | np.ndarray, columns: int | None = None, padding: int = 2) -> Image.Image:
    """Lay images out row by row on white.

    images: uint8 (n, 3, H, W). columns: about as many as rows by default. Raises ShapeError for other images.
    """
    pixels = np.asarray(images)
    if pixels.ndim != 4 or pixels.shape[1] != 3 or pixels.dtype != np.uint8 or not len(pixels):
        raise ShapeError(f"a grid takes uint8 (n, 3, H, W), but got {pixels.dtype} {pixels.shape}")
    count, _, height, width = pixels.shape
    columns = min(count, columns or math.ceil(math.sqrt(count)))
    rows = -(-count // columns)
    grid = Image.new("RGB", (columns * (width + padding) + padding, rows * (height + padding) + padding), "white")
    for number, image in enumerate(pixels):
        row, column = divmod(number, columns)
        at = (padding + column * (width + padding), padding + row * (height + padding))
        grid.paste(Image.fromarray(image.transpose(1, 2, 0)), at)
    return grid


def choose_for_grid(
    pairs: Sequence[tuple[int, int]], columns: int | None = None
) -> tuple[list[tuple[int, int]], int | None]:
    """Choose which samples a grid shows: the first of each class, a row a class; of one class the first 64.

    pairs: (class index, index) of all. columns: images of a row, at most 8 by default. Of more than 16 classes 16 are
    shown, spread evenly. Returns the choice, class by class, and its columns; None leaves them to `make_grid`.
    """
    by_class: dict[int, list[tuple[int, int]]] = {}
    for pair in pairs:
        by_class.setdefault(pair[0], []).append(pair)
    rows = list(by_class.values())
    width = min(columns or _GRID_COLUMNS, max(map(len, rows), default=0))
    if len(rows) == 1 or width == 1:
        return list(pairs)[:_GRID_IMAGES], columns
    if len(rows) > _GRID_ROWS:
        rows = [rows[round(place)] for place in np.linspace(0, len(rows) - 1, _GRID_ROWS)]
    width = min(width, min(map(len, rows)))
    return [pair for row in rows for pair in row[:width]], width


def write_sample(out: Path, class_index: int, index: int, image: Tensor | np.ndarray) -> Path:
    """Write the `index`-th image of a class, uint8 (3, H, W), into a folder that a `SamplesWriter` holds."""
    path = Path(out) / sample_name(class_index, index)
    save_png(path, image, durable=False, is_sample=True)
    return path


def write_npz(
    path: Path, images: Iterable[np.ndarray], count: int, side: int, arrays: Mapping[str, np.ndarray] | None = None
) -> None:
    """Write the npz of the ADM evaluation suite (Dhariwal and Nichol, arXiv:2105.05233): `arr_0`, uint8 (N, H, W, 3).

    images: `count` arrays uint8 (3, side, side), written one at a time, so that memory holds one. arrays: more, by name.
    Raises ShapeError if the number or shape of images differs.
    """
    written = 0
    member = zipfile.ZipInfo("arr_0.npy", _NPZ_DATE)
    with atomic_path(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        with archive.open(member, "w", force_zip64=True) as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": (count, side, side, 3)}
            np.lib.format.write_array_header_1_0(file, header)
            for image in images:
                if image.shape != (3, side, side) or image.dtype != np.uint8:
                    raise ShapeError(f"npz images must be uint8 (3, {side}, {side}), but one is {image.shape}")
                file.write(np.ascontiguousarray(image.transpose(1, 2, 0)).tobytes())
                written += 1
        for name, array in (arrays or {}).items():
            with archive.open(zipfile.ZipInfo(f"{name}.npy", _NPZ_DATE), "w", force_zip64=True) as file:
                np.lib.format.write_array(file, array, allow_pickle=False)
        if written != count:
            raise ShapeError(f"the npz was to hold {count} images, but {written} came")


def list_images(folder: Path) -> list[Path]:
    """Return all image files below `folder` in natural order ("2.png" before "10.png"), without the grid.

    Raises DataError if there is none.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"there is no folder `{escape_path(str(folder))}`", "pass a folder of images")
    # os.walk and plain texts: Path objects took longer here than hashing all the files
    found = [
        os.path.join(place, name)
        for place, _, names in os.walk(folder)
        for name in names
        if os.path.splitext(name)[1].lower() in SUFFIXES and name != GRID_NAME and not name.startswith(".")
    ]
    found = [path for path in found if os.path.isfile(path)]
    if not found:
        raise DataError(f"`{escape_path(str(folder))}` holds no images", f"images end in {', '.join(sorted(SUFFIXES))}")
    prefix = len(os.path.join(folder, ""))
    return [Path(path) for path in sorted(found, key=lambda path: _natural(path[prefix:].replace(os.sep, "/")))]


def read_images(paths: Iterable[Path], batch_size: int = 64, size: tuple[int, int] | None = None) -> Iterator[Tensor]:
    """Read images of one size in batches, uint8 (n, 3, H, W).

    size: width and height they must have; None takes those of the first. Raises DataError naming the file if one cannot
    be used or has another size: a metric over fewer images is another number.
    """
    import torch

    batch: list[np.ndarray] = []
    for path in paths:
        try:
            image, _ = load_image(path)
        except UnusableImage as reason:
            raise DataError(f"`{escape_path(str(path))}`: {reason}", "remove it, or make it again") from None
        size = size or image.size
        if image.size != size:
            raise DataError(f"`{escape_path(str(path))}` is {image.size}, but the images before it are {size} pixels")
        batch.append(np.asarray(image).transpose(2, 0, 1))
        if len(batch) == batch_size:
            yield torch.from_numpy(np.stack(batch))
            batch = []
    if batch:
        yield torch.from_numpy(np.stack(batch))


class SamplesWriter(contextlib.AbstractContextManager["SamplesWriter"]):
    """Write samples into `out` one by one; a killed job keeps what it finished, and the same one goes on.

        with SamplesWriter(out, settings) as writer:
            for class_index, index in writer.missing(wanted):
                writer.write(class_index, index, image)
            manifest = writer.finish(wanted, info)

    settings: JSON values that decide the pixels (model, seed, guidance, ...). Entering raises ConfigError if `out` was
    begun with other ones, ArtifactError if it holds something else, LockedError if another process writes it.
    """

    def __init__(self, out: Path, settings: Mapping[str, Any]) -> None:
        self.out = Path(out)
        self.settings = json.loads(json.dumps(dict(settings)))  # as a manifest gives them back
        self._stack = contextlib.ExitStack()
        self._present: set[str] = set()

    def __enter__(self) -> Self:
        self._stack.enter_context(hold_folder(self.out, {MANIFEST_NAME, PLAN_NAME}, "samples"))
        try:
            self._resume()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def missing(self, wanted: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
        """Return those (class index, index) whose image is not there yet, in the order given."""
        return [pair for pair in wanted if sample_name(*pair) not in self._present]

    def write(self, class_index: int, index: int, image: Tensor | np.ndarray) -> Path:
        """Write one image, uint8 (3, H, W), and return its path."""
        path = write_sample(self.out, class_index, index, image)
        self._present.add(path.name)
        return path

    def add(self, pairs: Iterable[tuple[int, int]]) -> None:
        """Count in the images of these (class index, index), which others wrote, such as an `ImageSaver`."""
        self._present.update(name for name in (sample_name(*pair) for pair in pairs) if (self.out / name).exists())

    def finish(
        self,
        wanted: Iterable[tuple[int, int]],
        info: Mapping[str, Any] | None = None,
        columns: int | None = None,
        npz: bool = False,
        extra: Iterable[str] = (),
    ) -> Manifest:
        """Write the grid of `wanted`, and the manifest (and npz if asked for) of all samples in the folder, by class.

        columns: of the grid, see `choose_for_grid`. info: added to the settings in the manifest. extra: other files of the
        folder, for the manifest to name. Raises ArtifactError if
        an image is missing or cannot be read back.
        """
        pairs = list(wanted)
        self.require_all(pairs)
        names = sorted(self._present, key=_natural)
        npz = npz or (self.out / NPZ_NAME).exists()  # one that is there stays true
        try:
            chosen, columns = choose_for_grid(pairs, columns)
            shown = read_images(self.out / sample_name(*pair) for pair in chosen)
            first = np.concatenate([batch.numpy() for batch in shown])
            save_png(self.out / GRID_NAME, make_grid(first, columns))
            paths = [self.out / name for name in names]
            if npz:
                pixels = (image.numpy() for batch in read_images(paths) for image in batch)
                write_npz(self.out / NPZ_NAME, pixels, len(paths), first.shape[-1])
        except DataError as error:
            raise ArtifactError(
                f"a sample was damaged since it was written: {error}", "delete it and run again"
            ) from None
        files = [*names, GRID_NAME, *([NPZ_NAME] if npz else []), *extra]
        manifest = write_manifest(self.out, SAMPLES_KIND, {**self.settings, **(info or {})}, files=files)
        self.forget_plan()
        return manifest

    @property
    def num_images(self) -> int:
        """Samples in the folder."""
        return len(self._present)

    def require_all(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Raise ArtifactError if one of these images is missing, or none is asked for."""
        lacking = len(self.missing(pairs))
        if lacking or not pairs:
            raise ArtifactError(f"`{self.out}` lacks {lacking} of {len(pairs)} samples", "run the same command again")

    def forget_plan(self) -> None:
        """Remove what stood for the manifest until there was one."""
        (self.out / PLAN_NAME).unlink(missing_ok=True)

    def _resume(self) -> None:
        if (self.out / MANIFEST_NAME).exists():
            begun = {key: read_manifest(self.out, SAMPLES_KIND).info.get(key) for key in self.settings}
        elif set(contents_of(self.out)) > {PLAN_NAME}:  # with something that was drawn by it
            begun = read_plan(self.out, SAMPLES_KIND)
        else:
            begun = self.settings
            write_json(self.out / PLAN_NAME, self.settings)
        sides = (begun, self.settings)
        names = sorted({*begun, *self.settings})  # what a side lacks is off there
        before, now = (
            {name: _OFF.get(name) if (value := side.get(name)) is None else value for name in names} for side in sides
        )
        changes = configs.differences(before, now, is_strict=True)
        if changes:
            raise ConfigError(
                f"`{self.out}` holds samples made with other settings: {'; '.join(changes.values())}",
                "repeat them to add to it, choose another --out, or delete that folder to start anew",
            )
        listed = read_manifest(self.out, SAMPLES_KIND).files if (self.out / MANIFEST_NAME).exists() else {}
        self._find(listed)

    def _find(self, listed: Mapping[str, FileEntry]) -> None:
        """Note which images are there. listed: files of the manifest, if there is one."""
        for path in self.out.iterdir():
            if _SAMPLE.fullmatch(path.name) and self._is_whole(path.name, listed.get(path.name)):
                self._present.add(path.name)

    def _is_whole(self, name: str, entry: FileEntry | None) -> bool:
        """Say whether a file is as its manifest says or, where none names it, an image that can be decoded to the end.

        Samples are not synced one by one, so a power cut can leave empty ones: those are drawn again.
        """
        path = self.out / name
        try:
            if entry is not None:
                return path.stat().st_size == entry.size and hash_file(path) == entry
            load_image(path)
        except (OSError, UnusableImage):
            return False
        return True


def _natural(name: str) -> list[tuple[int, int | str]]:
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in re.split(r"(\d+)", name)]
