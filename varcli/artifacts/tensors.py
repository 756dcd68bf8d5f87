"""The safetensors format, read without copying: a header checked as strictly as the library does, tensors that are views.

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
LENGTH = struct.Struct("<Q")  # of the header, in front of it
_MOST_AXES = 64  # of torch's tensors
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


def parse_header(head: bytes | memoryview, size: int, path: Path) -> dict[str, TensorEntry]:
    """Return what the header of a safetensors file says, from its first bytes; what follows the header need not be there.

    size: of the whole file. path: for messages. Raises ArtifactError for what no honest writer makes, some of which the
    library accepts: a header over 16 MB or not starting with `{`, a name that stands twice, data with holes in it or of
    another size than the file's.
    """
    foreign = ArtifactError(
        f"`{path}` is not a safetensors file", "varcli import reads .pth files, other commands do not"
    )
    if len(head) <= LENGTH.size:
        raise foreign
    (length,) = LENGTH.unpack_from(head)
    data_start = LENGTH.size + length
    if length > MAX_HEADER or bytes(head[LENGTH.size : LENGTH.size + 1]) != b"{":
        if bytes(head[:64]).startswith(b"version https://git-lfs"):
            raise ArtifactError(f"`{path}` is a git-lfs pointer, not the file itself", "run `git lfs pull`")
        raise foreign
    try:
        text = bytes(head[LENGTH.size : data_start]).decode("utf-8")
        header = json.loads(text, object_pairs_hook=_refuse_duplicates, parse_constant=_refuse)
        _check_metadata(header.pop("__metadata__", None))
        entries = {name: _read_entry(name, entry, data_start) for name, entry in header.items()}
        end = data_start
        for entry in sorted(entries.values(), key=lambda entry: (entry.start, entry.end)):
            if entry.start != end or entry.end < entry.start:
                raise ValueError("tensors overlap or leave bytes between them")
            end = entry.end
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise ArtifactError(f"`{path}` has a damaged safetensors header: {error}") from None
    if size != end:
        raise ArtifactError(
            f"`{path}` is not whole: {size:,} bytes, and its header speaks of {end:,}", "fetch or make it again"
        )
    return entries


def parse_tensors(data: memoryview, path: Path) -> dict[str, Any]:
    """Return the tensors of a safetensors file as views of `data`, which can be written and belongs to them from now on.

    path: for messages. Raises ArtifactError if it is damaged.
    """
    import torch

    tensors = {}
    for name, entry in parse_header(data, len(data), path).items():
        dtype = getattr(torch, _DTYPES.get(entry.dtype, ""), None)
        if dtype is None:
            raise ArtifactError(
                f"`{path}`: `{name}` holds numbers of a type that varcli does not read: {entry.dtype}",
                "store them as F32, F16 or BF16",
            )
        count = math.prod(entry.shape)
        if entry.end - entry.start != count * dtype.itemsize:
            raise ArtifactError(f"`{path}` has a damaged safetensors header: `{name}` has another size than its shape")
        if count == 0:  # of which torch makes no view
            flat = torch.empty(0, dtype=dtype)
        elif entry.start % dtype.itemsize:
            flat = torch.frombuffer(bytearray(data[entry.start : entry.end]), dtype=dtype)
        else:
            flat = torch.frombuffer(data, dtype=dtype, count=count, offset=entry.start)
        try:
            tensors[name] = flat.view(entry.shape)
        except RuntimeError:  # as [2**62, 2**62, 0]
            raise ArtifactError(f"`{path}`: `{name}` has a shape that torch does not take: {entry.shape}") from None
    return tensors


def _read_entry(name: str, entry: dict[str, Any], data_start: int) -> TensorEntry:
    name.encode("utf-8")  # raises ValueError for half of a surrogate pair
    start, end = entry["data_offsets"]
    if len(entry["shape"]) > _MOST_AXES:
        raise ValueError(f"a tensor has {len(entry['shape'])} axes, more than {_MOST_AXES}")
    for number in (start, end, *entry["shape"]):
        if type(number) is not int or not 0 <= number < 2**63:
            raise ValueError(f"{number!r} is no size")
    return TensorEntry(str(entry["dtype"]), tuple(entry["shape"]), data_start + start, data_start + end)


def _check_metadata(metadata: Any) -> None:
    if metadata is None:
        return
    for part in (*metadata.keys(), *metadata.values()):
        part.encode("utf-8")


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    if len(set(keys)) != len(keys):
        raise ValueError("one name stands twice")
    return dict(pairs)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number of JSON")
