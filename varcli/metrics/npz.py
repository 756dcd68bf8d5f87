"""npz files of evaluation suites, read without trust: images streamed from the archive, statistics checked."""

from __future__ import annotations

import contextlib
import json
import math
import os
import struct
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from varcli.artifacts.manifest import digest_json
from varcli.data.paths import escape_path
from varcli.errors import ArtifactError, DataError, ShapeError, UnsafeFileError
from varcli.metrics.statistics import Statistics, check_statistics

IMAGES_KEY, LABELS_KEY = "arr_0", "arr_1"
STATISTICS_KEYS, SPATIAL_KEYS = ("mu", "sigma"), ("mu_s", "sigma_s")
RECORD_KEY = "varcli"
"""A JSON text of what made the file, in those that varcli wrote."""

_DAMAGE = (zipfile.BadZipFile, OSError, EOFError, zlib.error, struct.error)
_MAX_CLASSES = 2**20
_MAX_RECORD = 2**20  # bytes
_MAX_STATISTICS = 2**30  # bytes; a 2048 x 2048 float64 matrix has 34 MB


@dataclass(frozen=True, kw_only=True)
class NpzFile:
    """What an npz holds, from its headers alone; arrays are read when asked for."""

    path: Path
    headers: dict[str, tuple[tuple[int, ...], np.dtype, bool]]  # shape, dtype, Fortran order of each array

    @property
    def image_shape(self) -> tuple[int, int, int] | None:
        """Number, height and width of the images, or None if there are none. Raises ShapeError if they are no images."""
        if IMAGES_KEY not in self.headers:
            return None
        shape, dtype, fortran = self.headers[IMAGES_KEY]
        if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or not math.prod(shape) or fortran:
            raise ShapeError(
                f"`{escape_path(str(self.path))}`: {IMAGES_KEY} must be uint8 (N, H, W, 3), but is {dtype} {shape}",
                "pixel values are whole numbers from 0 to 255, channels last, in C order",
            )
        return shape[0], shape[1], shape[2]

    def read_images(self, batch_size: int, start: int = 0, stop: int | None = None) -> Iterator[Tensor]:
        """Yield images start, ..., stop - 1 as uint8 (n, 3, H, W); memory holds one batch.

        Raises DataError if the file is damaged.
        """
        count, height, width = self.image_shape or (0, 0, 0)
        count = count if stop is None else stop
        size = height * width * 3
        try:
            with _open_member(self.path, f"{IMAGES_KEY}.npy", seeks=start > 0) as file:
                _read_header(file)
                file.seek(start * size, os.SEEK_CUR)
                for first in range(start, count, batch_size):
                    wanted = min(batch_size, count - first)
                    data = file.read(wanted * size)
                    if len(data) != wanted * size:
                        raise DataError(f"`{escape_path(str(self.path))}` ends in the middle of its images")
                    pixels = np.frombuffer(bytearray(data), np.uint8).reshape(wanted, height, width, 3)
                    yield torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
        except _DAMAGE as error:
            raise self._damaged(error) from None

    @property
    def has_quick_seek(self) -> bool:
        """Whether the images are stored as they are, so that reading may begin anywhere."""
        with zipfile.ZipFile(self.path) as archive:
            return _is_plain(archive.getinfo(f"{IMAGES_KEY}.npy"))

    def read_labels(self) -> np.ndarray | None:
        """Return the class of each image, int64 (N,), or None if the file holds none, or numbers too large for classes.

        Raises DataError if they are damaged.
        """
        if LABELS_KEY not in self.headers or self.image_shape is None:
            return None
        shape, dtype, _ = self.headers[LABELS_KEY]
        if shape != (self.image_shape[0],) or dtype.kind not in "iu":
            return None
        try:
            with np.load(self.path, allow_pickle=False) as stored:
                labels = stored[LABELS_KEY]
        except (*_DAMAGE, ValueError) as error:
            raise DataError(
                f"`{escape_path(str(self.path))}`: its labels are damaged: {error}", "make it again"
            ) from None
        return labels.astype(np.int64) if len(labels) and labels.max() < _MAX_CLASSES else None

    def digest_images(self) -> str:
        """Hash what the archive says of its images: size and CRC of the member, and its shape."""
        with zipfile.ZipFile(self.path) as archive:
            member = archive.getinfo(f"{IMAGES_KEY}.npy")
        return digest_json({"crc": member.CRC, "size": member.file_size, "shape": list(self.image_shape or ())})

    def read_record(self) -> dict[str, Any]:
        """Return what a file that varcli wrote says of itself; empty for others. Raises ShapeError if it is garbled."""
        if RECORD_KEY not in self.headers:
            return {}
        shape, dtype, _ = self.headers[RECORD_KEY]
        try:
            if shape != () or dtype.kind != "U" or dtype.itemsize > _MAX_RECORD:
                raise ValueError(f"{dtype} {shape}")
            value = json.loads(str(self._read_array(RECORD_KEY)))
            _check_record(value)
        except (ValueError, RecursionError) as error:
            raise ShapeError(
                f"`{escape_path(str(self.path))}`: its `{RECORD_KEY}` is no record of varcli's: {error}",
                "make it again",
            ) from None
        return value

    def read_statistics(self, keys: tuple[str, str]) -> Statistics | None:
        """Return the checked statistics stored under `keys` (mean, covariance), or None if one of them is missing."""
        if not set(keys) <= set(self.headers):
            return None
        arrays = []
        for key in keys:
            shape, dtype, _ = self.headers[key]
            if math.prod(shape) * dtype.itemsize > _MAX_STATISTICS:
                raise ShapeError(f"`{escape_path(str(self.path))}`: {key} has the shape {shape}, too large to be true")
            arrays.append(self._read_array(key))
        return check_statistics(f"`{escape_path(str(self.path))}`, {keys[0]} and {keys[1]}", *arrays)

    def _read_array(self, key: str) -> np.ndarray:
        try:
            with np.load(self.path, allow_pickle=False) as stored:
                return stored[key]
        except _DAMAGE as error:
            raise self._damaged(error) from None

    def _damaged(self, error: Exception) -> DataError:
        return DataError(f"`{escape_path(str(self.path))}` is damaged: {error}", "make it or fetch it again")


def _check_record(value: Any) -> None:
    """Raise ValueError for a record whose entries have not the form that `varcli reference build` gives them."""
    if not isinstance(value, dict):
        raise ValueError("no object")
    images = value.get("images", {})
    count = images.get("count", 1) if isinstance(images, dict) else 0
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise ValueError("its count of images is no count")
    for key in ("network", "weights_sha256"):
        if not isinstance(value.get(key, ""), str):
            raise ValueError(f"its {key} is no text")


def open_npz(path: Path) -> NpzFile:
    """Read the headers of an npz file.

    Raises UnsafeFileError if it holds Python objects, a name twice or an array larger or smaller than it says,
    ArtifactError if it is no npz file or holds nothing that can be evaluated.
    """
    shown = escape_path(str(path))
    headers = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                name = member.filename.removesuffix(".npy")
                if name in headers:
                    raise UnsafeFileError(f"`{shown}` holds `{escape_path(name)}` twice")
                with archive.open(member) as file:
                    shape, fortran, dtype = _read_header(file)
                    header_size = file.tell()
                if dtype.hasobject:
                    raise UnsafeFileError(
                        f"`{shown}`: `{escape_path(name)}` holds Python objects, which could run code",
                        "save plain arrays of numbers",
                    )
                if member.file_size != header_size + math.prod(shape) * dtype.itemsize:
                    raise UnsafeFileError(f"`{shown}`: `{escape_path(name)}` has not the size that its header says")
                headers[name] = (shape, dtype, fortran)
    except OSError as error:
        raise ArtifactError(f"cannot read `{shown}`: {error.strerror or error}") from None
    except (zipfile.BadZipFile, ValueError, EOFError, NotImplementedError, RuntimeError) as error:
        raise ArtifactError(f"`{shown}` is not a whole npz file: {error}", "make or fetch it again") from None
    if not {IMAGES_KEY, STATISTICS_KEYS[0]} & set(headers):
        found = ", ".join(escape_path(name) for name in sorted(headers)[:8]) or "nothing"
        raise ArtifactError(
            f"`{shown}` holds neither images nor statistics, but {found}",
            f"images are stored as {IMAGES_KEY}, statistics as {' and '.join(STATISTICS_KEYS)}",
        )
    return NpzFile(path=Path(path), headers=headers)


_LOCAL_HEADER = struct.Struct("<4s22xHH")  # of a zip member: signature, lengths of its name and extra field


def _is_plain(member: zipfile.ZipInfo) -> bool:
    """Whether a member's bytes lie in the archive as they are."""
    return member.compress_type == zipfile.ZIP_STORED and not member.flag_bits & 1


@contextlib.contextmanager
def _open_member(path: Path, name: str, seeks: bool) -> Iterator[IO[bytes]]:
    """Open a member of an archive; with `seeks`, a plain one as a part of the file, since zipfile seeks by reading.

    Read from its start, a member is checked against its CRC.
    """
    with zipfile.ZipFile(path) as archive:
        member = archive.getinfo(name)
        if not seeks or not _is_plain(member):
            with archive.open(member) as file:
                yield file
            return
    with open(path, "rb") as file:
        file.seek(member.header_offset)
        signature, name_length, extra_length = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
        if signature != b"PK\x03\x04":
            raise zipfile.BadZipFile("a member is not where the archive says")
        file.seek(name_length + extra_length, os.SEEK_CUR)
        yield file


def _read_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Read the header of one .npy member; nothing in it is run."""
    version = np.lib.format.read_magic(file)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in readers:
        raise ValueError(f"array format {version} is not known")
    return readers[version](file)
