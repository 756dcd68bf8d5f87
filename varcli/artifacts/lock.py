"""One writer at a time: a kernel lock on the output folder, which dies with its process."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock, Timeout

from varcli.errors import LockedError

LOCK_NAME = ".lock"
_OWNER_NAME = ".lock-owner.json"


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Hold `folder` for writing. Raises LockedError at once, naming the holder, if another process has it."""
    lock = FileLock(folder / LOCK_NAME)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise LockedError(
            f"`{folder}` is being written by {_owner(folder)}", "wait for it, stop it, or choose another --out"
        ) from None
    owner = {"pid": os.getpid(), "host": socket.gethostname(), "since": datetime.now(UTC).isoformat(timespec="seconds")}
    try:
        # a note for the next one's message, so plain and unsynced
        with contextlib.suppress(OSError):
            (folder / _OWNER_NAME).write_text(json.dumps(owner), encoding="utf-8")
        yield
    finally:
        (folder / _OWNER_NAME).unlink(missing_ok=True)
        lock.release()


def contents(folder: Path) -> list[str]:
    """Return the sorted names of what lies in a folder, its lock left out."""
    return sorted(entry.name for entry in Path(folder).iterdir() if entry.name not in (LOCK_NAME, _OWNER_NAME))


def _owner(folder: Path) -> str:
    try:
        owner = json.loads((folder / _OWNER_NAME).read_text(encoding="utf-8"))
        return f"process {owner['pid']} on {owner['host']} since {owner['since']}"
    except (OSError, ValueError, KeyError):
        return "another process"
