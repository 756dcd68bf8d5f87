"""Files written by others: what they are is decided by their bytes, and a pickle is read in torch's restricted way only.

A `.pth` file is a zip archive around a pickle, and a pickle is a program. So its archive is first checked without torch:
nothing but the members that `torch.save` writes, stored as they are, names and sizes consistent. Then torch's restricted
loader reads it, which knows tensors and plain values and nothing else; nothing is added to what it allows.
"""

from __future__ import annotations

import hashlib
import io
import re
import stat
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from varcli.artifacts.pickle_scan import scan_pickle
from varcli.artifacts.verify import read_tensors
from varcli.errors import ArtifactError, UnsafeFileError

_MAX_MEMBERS = 20_000
_MAX_PICKLE = 64 * 2**20  # bytes; the largest released model has 60 kB
_MEMBER = re.compile(
    r"data\.pkl|version|byteorder|\.format_version|\.storage_alignment|\.data/serialization_id|data/\d+"
)
_PLAIN_FLAGS = 0x0808  # names in UTF-8, sizes after the data: what torch.save sets
_MIN_TORCH = (2, 10)  # before it, hostile bytes could corrupt the restricted loader's memory (CVE-2026-24747)
_ADVICE = "ask its author for safetensors"


@dataclass(frozen=True, kw_only=True)
class Archive:
    """What a `.pth` file consists of, read without running its pickle."""

    num_members: int
    tensor_bytes: int
    names: tuple[str, ...]  # every text in the pickle, in order: the tensors' names are among them
    globals: tuple[str, ...]  # every class and function it asks for, e.g. "collections OrderedDict"


def read_foreign(path: Path) -> Mapping[str, Any]:
    """Read a safetensors or `.pth` file; links are followed.

    Returns what was saved: a mapping of names to tensors, possibly with more mappings and plain values inside. Tensors
    may be views of the file. Raises UnsafeFileError (exit code 4) for what could run code or is no format of these, and
    ArtifactError for files that are damaged or not the file itself.
    """
    if file_kind(path) == "safetensors":
        return read_tensors(Path(path).resolve())
    return read_pickled_tensors(path)


def read_pickled_tensors(path: Path) -> Mapping[str, Any]:
    """Read a `.pth` file: its archive checked first, then torch's restricted loader; see `read_foreign`."""
    import torch

    check_archive(path)
    if _version_of(torch.__version__) < _MIN_TORCH:
        raise ArtifactError(
            f"torch {torch.__version__} reads foreign pickles unsafely", "upgrade to torch 2.10 or newer"
        )
    try:
        value = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # hostile bytes can make the restricted loader fail in any way
        raise UnsafeFileError(f"`{path}` is refused: {_reason(error)}", _ADVICE) from error
    if not isinstance(value, Mapping):
        raise ArtifactError(f"`{path}` holds a {type(value).__name__}, but named tensors are needed", _ADVICE)
    _check_sizes(value, path)
    return value


def read_known_pickle(path: Path, sha256: str) -> Mapping[str, Any]:
    """Read a pickle whose every byte is known: only one with this SHA-256 reaches torch's restricted loader.

    For published files in torch's format from before 1.6, which `read_foreign` refuses. Raises UnsafeFileError for other
    bytes, ArtifactError if the file cannot be read.
    """
    import torch

    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise ArtifactError(f"cannot read `{path}`: {error.strerror}") from None
    if hashlib.sha256(data).hexdigest() != sha256:  # of the bytes that are parsed, so that a swap in between is seen
        raise UnsafeFileError(f"`{path}` is not the file with SHA-256 {sha256}", "download it again")
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def check_archive(path: Path) -> Archive:
    """Check a `.pth` file's archive without torch and without running its pickle.

    Raises UnsafeFileError if it holds anything that `torch.save` does not write, ArtifactError if it is not whole.
    """
    path = Path(path)
    if file_kind(path) != "pickle":
        raise ArtifactError(f"`{path}` is a safetensors file, not a .pth file")
    if path.suffix == ".safetensors":
        raise UnsafeFileError(
            f"`{path}` is named .safetensors, but is a pickle inside", "do not trust where it is from"
        )
    size = path.stat().st_size
    try:
        with zipfile.ZipFile(path) as archive:
            _check_members(archive, path, size)
            data = _read_pickle(archive, path)
            members = archive.infolist()
    except zipfile.BadZipFile as error:
        if not _has_zip_end(path, size):
            raise ArtifactError(
                f"`{path}` is not whole: {size:,} bytes, and the end of the archive is missing", "download it again"
            ) from None
        raise UnsafeFileError(f"`{path}` is a damaged or forged archive: {error}", "download it again") from None
    except (NotImplementedError, RuntimeError, EOFError, ValueError, OverflowError) as error:
        raise UnsafeFileError(f"`{path}` is a damaged or forged archive: {error}", "download it again") from None
    try:
        scan = scan_pickle(data)
    except (ValueError, OverflowError) as error:
        raise UnsafeFileError(f"`{path}` is refused: its pickle is damaged: {error}", "download it again") from None
    sizes = {name: member.file_size for member in members if (name := member.filename.partition("/data/")[2])}
    if scan.storages != sizes:
        wrong = sorted(key for key in {*sizes, *scan.storages} if sizes.get(key) != scan.storages.get(key))
        raise UnsafeFileError(
            f"`{path}` is refused: its pickle claims {scan.storages.get(wrong[0], 0):,} bytes for the data `{wrong[0]}`, "
            f"which has {sizes.get(wrong[0], 0):,}",
            "download it again",
        )
    return Archive(
        num_members=len(members), tensor_bytes=sum(sizes.values()), names=tuple(scan.texts), globals=tuple(scan.globals)
    )


def file_kind(path: Path) -> str:
    """Return "safetensors" or "pickle" by a file's first bytes, whatever its name says.

    Raises UnsafeFileError or ArtifactError, saying what it is, for anything else.
    """
    try:
        if not stat.S_ISREG(Path(path).stat().st_mode):  # first, since opening a pipe would wait for ever
            raise ArtifactError(f"`{path}` is not a regular file", "pass a .pth or .safetensors file")
        with open(path, "rb") as file:
            start = file.read(512)
    except OSError as error:
        raise ArtifactError(f"cannot read `{path}`: {error.strerror}") from None
    if start.startswith(b"PK\x03\x04"):
        return "pickle"
    if start[8:9] == b"{":
        return "safetensors"
    if not start:
        raise ArtifactError(f"`{path}` is empty", "download it again")
    if start.startswith(b"version https://git-lfs"):
        raise ArtifactError(f"`{path}` is a git-lfs pointer, not the file itself", "run `git lfs pull`")
    if start.lstrip()[:9].lower() in (b"<!doctype", b"<html>") or start.lstrip()[:5].lower() == b"<html":
        raise ArtifactError(f"`{path}` is a web page, not weights", "download the file itself, not the page about it")
    what = "is no format that varcli reads"
    if start[:1] == b"\x80":
        what = "is a pickle in torch's old format, whose reading can run code"
    elif start[:2] == b"\x1f\x8b" or start[257:262] == b"ustar":
        what = "is a tar or gzip archive, which can hide a pickle"
    raise UnsafeFileError(f"`{path}` is refused: it {what}", "pass safetensors, or a .pth file of torch 1.6 or newer")


def _check_members(archive: zipfile.ZipFile, path: Path, size: int) -> None:
    """Refuse any archive that torch.save would not have written."""

    def refuse(what: str) -> UnsafeFileError:
        return UnsafeFileError(f"`{path}` is refused: {what}", _ADVICE)

    members = archive.infolist()
    if not members or len(members) > _MAX_MEMBERS:
        raise refuse(f"its archive has {len(members):,} members")
    if archive.comment or not _ends_plainly(path, size):
        raise refuse("its archive goes on after its end")
    roots = {member.orig_filename.split("/")[0] for member in members}
    if len(roots) != 1 or not re.fullmatch(r"[^\\:\x00-\x1f]+", root := roots.pop()) or root in (".", ".."):
        raise refuse("its archive is not one folder with a plain name")
    seen: set[str] = set()
    end = 0
    for member in sorted(members, key=lambda member: member.header_offset):
        name = member.orig_filename
        if not _MEMBER.fullmatch(name[len(root) + 1 :]) or name != member.filename:
            raise refuse(f"its archive holds `{name[:80]!r}`, which torch.save never writes")
        if name.casefold() in seen:
            raise refuse(f"its archive holds `{name}` twice")
        seen.add(name.casefold())
        if member.compress_type != zipfile.ZIP_STORED or member.compress_size != member.file_size:
            raise refuse(f"`{name}` is compressed, which torch.save never does")
        if member.flag_bits & ~_PLAIN_FLAGS:
            raise refuse(f"`{name}` has flags that torch.save never sets")
        if member.header_offset < end or (end == 0 and member.header_offset != 0):
            raise refuse(f"`{name}` overlaps another member, or bytes stand before the first")
        end = member.header_offset + 30 + len(name.encode()) + member.file_size
    if end > size:
        raise refuse("its members are larger than the file")
    if f"{root}/data.pkl".casefold() not in seen:
        raise refuse("it holds no data.pkl")
    if (damaged := archive.testzip()) is not None:  # also compares each local name with the directory's
        raise refuse(f"the checksum or header of `{damaged}` is wrong: it was damaged or edited")


def _read_pickle(archive: zipfile.ZipFile, path: Path) -> bytes:
    (member,) = (member for member in archive.infolist() if member.filename.endswith("/data.pkl"))
    if member.file_size > _MAX_PICKLE:
        raise UnsafeFileError(f"`{path}` is refused: its pickle has {member.file_size:,} bytes", _ADVICE)
    return archive.read(member)


def _check_sizes(value: Mapping[str, Any], path: Path) -> None:
    """Refuse tensors that would grow when copied: views that repeat their storage, or are no plain tensors."""
    import torch

    pending: list[Any] = [value]
    visited: set[int] = set()
    total_bytes = 0
    while pending:
        entry = pending.pop()
        if isinstance(entry, torch.Tensor):
            plain = entry.layout == torch.strided and not entry.is_quantized and entry.device.type == "cpu"
            if not plain or entry.nbytes > entry.untyped_storage().nbytes():
                raise UnsafeFileError(
                    f"`{path}` is refused: a tensor of shape {tuple(entry.shape)} is not plain", _ADVICE
                )
            total_bytes += entry.nbytes
        elif id(entry) not in visited and isinstance(entry, (Mapping, list, tuple)):
            visited.add(id(entry))
            pending.extend(entry.values() if isinstance(entry, Mapping) else entry)
    if total_bytes > 2 * path.stat().st_size:  # twice, for weights that are tied
        raise UnsafeFileError(
            f"`{path}` is refused: its tensors share bytes to pretend {total_bytes:,} of them", _ADVICE
        )


def _reason(error: Exception) -> str:
    """Say in one line what the restricted loader refused."""
    text = str(error)
    if blocked := re.search(r"unsupported GLOBAL (\S+) whose module \S+ is blocked", text):
        return f"its pickle asks for `{blocked[1]}`, which could run code"
    if named := re.search(r"GLOBAL (\S+) was not an allowed global", text):
        return f"its pickle asks for `{named[1]}`, and only tensors and plain values are read"
    lines = [line.strip() for line in text.splitlines() if line.strip() and "weights_only" not in line]
    return (
        f"its pickle cannot be read as tensors and plain values ({lines[0][:200] if lines else type(error).__name__})"
    )


def _ends_plainly(path: Path, size: int) -> bool:
    """Say whether the archive's end record, without a comment, is the last thing in the file."""
    with open(path, "rb") as file:
        file.seek(max(size - 22, 0))
        return file.read(4) == b"PK\x05\x06"


def _has_zip_end(path: Path, size: int) -> bool:
    with open(path, "rb") as file:
        file.seek(max(size - 2**16 - 22, 0))
        return b"PK\x05\x06" in file.read()


def _version_of(text: str) -> tuple[int, int]:
    major, minor = re.findall(r"\d+", text)[:2]
    return int(major), int(minor)
