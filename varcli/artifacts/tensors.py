"""The safetensors format, read without copying: its header checked to the last byte, its tensors views of what was read.

safetensors itself copies every tensor while no other thread can run Python, half a second for a model of a gigabyte.
Format: https://github.com/huggingface/safetensors.
"""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any, NamedTuple

from varcli.errors import ArtifactError

MAX_HEADER = 16 * 2**20  # bytes; d36 has a header of 60 kB
_LENGTH = struct.Struct("<Q")  # of the header, in front of it
_DTYPES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "F8_E5M2": "float8_e5m2", "F8_E4M3": "float8_e4m3fn",
    "U16": "uint16", "I16": "int16", "F16": "float16", "BF16": "bfloat16",
    "U32": "uint32", "I32": "int32", "F32": "float32", "U64": "uint64", "I64": "int64", "F64": "float64",
}  # fmt: skip


class TensorEntry(NamedTuple):
    """What a header says of one tensor."""

    dtype: str  # "F32", "F16", ...
    shape: tuple[int, ...]
    start: int  # bytes from the beginning of the file
    end: int


def parse_header(start: bytes | bytearray, path: Path) -> dict[str, TensorEntry]:
    """Return what the header at the start of a safetensors file says; its data need not be there.

    path: for messages. Raises ArtifactError for what no honest writer makes, some of which the library accepts: a header
    over 16 MB or not starting with `{`, a name that stands twice, data with holes in it.
    """
    foreign = ArtifactError(
        f"`{path}` is not a safetensors file", "varcli import reads .pth files, other commands do not"
    )
    if len(start) <= _LENGTH.size:
        raise foreign
    (length,) = _LENGTH.unpack_from(start)
    first = _LENGTH.size + length
    if length > MAX_HEADER or start[_LENGTH.size : _LENGTH.size + 1] != b"{":
        if start.startswith(b"version https://git-lfs"):
            raise ArtifactError(f"`{path}` is a git-lfs pointer, not the file itself", "run `git lfs pull`")
        raise foreign
    try:
        header = json.loads(start[_LENGTH.size : first], object_pairs_hook=_refuse_duplicates)
        header.pop("__metadata__", None)
        entries = {name: _read_entry(entry, first) for name, entry in header.items()}
        end = first
        for entry in sorted(entries.values(), key=lambda entry: (entry.start, entry.end)):
            if entry.start != end or entry.end < entry.start:
                raise ValueError("tensors overlap or leave bytes between them")
            end = entry.end
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise ArtifactError(f"`{path}` has a damaged safetensors header: {error}") from None
    return entries


def require_whole(entries: dict[str, TensorEntry], size: int, start: bytes | bytearray, path: Path) -> None:
    """Raise ArtifactError unless a file of `size` bytes ends where its last tensor does. start: the file's beginning."""
    end = max((entry.end for entry in entries.values()), default=_LENGTH.size + _LENGTH.unpack_from(start)[0])
    if size != end:
        raise ArtifactError(
            f"`{path}` is not whole: {size:,} bytes, and its header speaks of {end:,}", "fetch or make it again"
        )


def parse_tensors(data: bytearray, path: Path) -> dict[str, Any]:
    """Return the tensors of a safetensors file as views of `data`, which belongs to them from now on.

    path: for messages. Raises ArtifactError if it is damaged.
    """
    import torch

    entries = parse_header(data, path)
    require_whole(entries, len(data), data, path)
    tensors = {}
    for name, entry in entries.items():
        dtype = getattr(torch, _DTYPES.get(entry.dtype, ""), None)
        if dtype is None:
            raise ArtifactError(f"`{path}` holds numbers of a type that varcli does not read: {entry.dtype}")
        count = math.prod(entry.shape)
        if entry.end - entry.start != count * dtype.itemsize:
            raise ArtifactError(f"`{path}` has a damaged safetensors header: `{name}` has another size than its shape")
        if count == 0:  # of which torch makes no view
            flat = torch.empty(0, dtype=dtype)
        elif entry.start % dtype.itemsize:
            flat = torch.frombuffer(data[entry.start : entry.end], dtype=dtype)
        else:
            flat = torch.frombuffer(data, dtype=dtype, count=count, offset=entry.start)
        try:
            tensors[name] = flat.view(entry.shape)
        except RuntimeError:  # as [2**62, 2**62, 0]
            raise ArtifactError(f"`{path}`: `{name}` has a shape that torch does not take: {entry.shape}") from None
    return tensors


def _read_entry(entry: dict[str, Any], first: int) -> TensorEntry:
    """first: where in the file the data begin."""
    start, end = entry["data_offsets"]
    for number in (start, end, *entry["shape"]):
        if type(number) is not int or not 0 <= number < 2**63:
            raise ValueError(f"{number!r} is no size")
    return TensorEntry(str(entry["dtype"]), tuple(entry["shape"]), first + start, first + end)


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    if len(set(keys)) != len(keys):
        raise ValueError("one name stands twice")
    return dict(pairs)
