"""The one way files are written: under a temporary name, flushed to disk, then renamed into place.

A reader therefore sees the old file or the new one, never half of either (RELIABILITY rule: temporary
name -> write -> fsync -> rename -> fsync of the folder).
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from varcli.errors import ArtifactError

TEMPORARY_PREFIX = ".tmp-"
_OLD_SUFFIX = ".old"  # of a folder that is being replaced
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def atomic_path(path: Path, durable: bool = True) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on a clean exit it is synced and renamed to `path`.

    durable: False leaves out the sync: for many small files of which a later manifest holds the hashes, where a power
    loss may cost some but a kill costs none. The temporary file is removed if the body raises. Raises ArtifactError if
    the disk is full or not writable.
    """
    path = Path(path)
    try:
        handle, name = tempfile.mkstemp(prefix=TEMPORARY_PREFIX, suffix=path.suffix, dir=path.parent)
        os.close(handle)
    except OSError as error:
        raise _write_error(path, error) from None
    temporary = Path(name)
    try:
        yield temporary
        if durable:
            _sync(temporary)
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
        if durable:
            _sync(path.parent)
    except OSError as error:
        raise _write_error(path, error) from None
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes, durable: bool = True) -> None:
    """Write `data` to `path` atomically; `durable` as in `atomic_path`."""
    with atomic_path(path, durable) as temporary:
        temporary.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` atomically, as UTF-8."""
    write_bytes(path, text.encode("utf-8", "surrogateescape"))


def write_json(path: Path, value: Any) -> None:
    """Write a JSON value to `path` atomically, indented, keys in the order given."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def write_tensors(path: Path, tensors: Mapping[str, Any], metadata: Mapping[str, str] | None = None) -> None:
    """Write torch tensors to a safetensors file atomically; they are made contiguous and moved to the CPU.

    metadata: text stored in the header. Raises ArtifactError if the disk is full or not writable.
    """
    import safetensors.torch
    from safetensors import SafetensorError

    ready = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    with atomic_path(path) as temporary:
        try:
            safetensors.torch.save_file(ready, temporary, metadata=dict(metadata or {}))
        except SafetensorError as error:  # the library wraps the operating system's error in its own text
            if "No space left" in str(error):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from None
            raise ArtifactError(f"cannot write `{path}`: {error}") from None


def write_arrays(path: Path, arrays: Mapping[str, Any]) -> None:
    """Write numpy arrays to an uncompressed npz atomically. Object arrays are refused with ArtifactError."""
    import numpy as np

    for name, array in arrays.items():
        if np.asarray(array).dtype.hasobject:
            raise ArtifactError(f"array `{name}` holds Python objects, which npz files of varcli never do")
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **dict(arrays))


def append_json_line(path: Path, record: Mapping[str, Any]) -> None:
    """Append one JSON line to a log. A torn last line, which a crash can leave, is for the reader to skip."""
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
    except OSError as error:
        raise _write_error(path, error) from None


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `folder`; on a clean exit it takes that folder's place, old content and all.

    The body writes its files through this module, so they are on disk by then. The temporary folder is removed if the
    body raises. A kill between the two renames leaves no `folder` but its old content beside it, which the next
    `prepare_folder` puts back. Raises ArtifactError if the disk is full or not writable.
    """
    folder = Path(folder)
    try:
        temporary = Path(tempfile.mkdtemp(prefix=TEMPORARY_PREFIX, dir=folder.parent))
        os.chmod(temporary, 0o777 & ~_umask())
    except OSError as error:
        raise _write_error(folder, error) from None
    try:
        yield temporary
        _sync(temporary)
        if folder.exists():
            old = folder.with_name(f"{TEMPORARY_PREFIX}{folder.name}{_OLD_SUFFIX}")
            shutil.rmtree(old, ignore_errors=True)
            os.replace(folder, old)
            os.replace(temporary, folder)
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.replace(temporary, folder)
        _sync(folder.parent)
    except OSError as error:
        raise _write_error(folder, error) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def prepare_folder(folder: Path, need_bytes: int = 0, sweep: bool = True) -> Path:
    """Make `folder` and prove, before any compute, that it can be written and has room for `need_bytes`.

    sweep: clear up after a killed run; False where another process may be writing there still.
    Raises ArtifactError with path and reason.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(f"{TEMPORARY_PREFIX}*") if sweep else ():
            _clear(leftover)
        with tempfile.TemporaryFile(prefix=TEMPORARY_PREFIX, dir=folder) as probe:
            probe.write(b"probe")
        free_bytes = shutil.disk_usage(folder).free
    except FileExistsError:
        raise ArtifactError(f"`{folder}` is a file, but an output folder is needed", "choose another --out") from None
    except OSError as error:
        raise _write_error(folder, error) from None
    if free_bytes < need_bytes:
        raise ArtifactError(
            f"`{folder}` has {_format_bytes(free_bytes)} free, but about {_format_bytes(need_bytes, math.ceil)} are needed",
            "free some space or choose another --out",
        )
    return folder


def _format_bytes(count: int, rounded: Callable[[float], int] = math.floor) -> str:
    """Write a size to a tenth, what is free rounded down and what is needed up, so that the two never look equal."""
    unit, size = ("GB", 1e9) if count >= 1e9 else ("MB", 1e6)
    return f"{rounded(count / size * 10) / 10:,.1f} {unit}"


def _clear(leftover: Path) -> None:
    """Remove what a killed run left, or put a folder back that it had moved away and not replaced yet."""
    target = leftover.with_name(leftover.name.removeprefix(TEMPORARY_PREFIX).removesuffix(_OLD_SUFFIX))
    if leftover.name.endswith(_OLD_SUFFIX) and not target.exists():
        os.replace(leftover, target)
    elif leftover.is_dir() and not leftover.is_symlink():
        shutil.rmtree(leftover, ignore_errors=True)
    else:
        leftover.unlink(missing_ok=True)


def publish_file(part: Path, target: Path) -> None:
    """Sync a finished file and rename it to `target` in the same folder."""
    try:
        _sync(part)
        os.replace(part, target)
        _sync(target.parent)
    except OSError as error:
        raise _write_error(target, error) from None


def _write_error(path: Path, error: OSError) -> ArtifactError:
    if error.errno == errno.ENOENT and not path.parent.exists():
        return ArtifactError(
            f"cannot write `{path}`: there is no folder `{path.parent}`", "make that folder, or choose another --out"
        )
    hint = "choose another --out, or change its permissions"
    if error.errno in _DISK_FULL:
        hint = "free some space and run the same command again: what was finished is kept"
    return ArtifactError(f"cannot write `{path}`: {error.strerror or error}", hint)


def _sync(path: Path) -> None:
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot fsync a folder
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() or os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
