"""One writer at a time: a kernel lock on the output folder, which dies with its process."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock, Timeout

from varcli.artifacts.write import TEMPORARY_PREFIX, prepare_folder
from varcli.errors import ArtifactError, LockedError

LOCK_NAME = ".lock"
_OWNER_NAME = ".lock-owner.json"
_PATIENCE = 0.2  # seconds: longer than `is_locked` of another process holds a lock it found free


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Hold `folder` for writing. Raises LockedError, naming the holder, if another process has it."""
    lock = FileLock(folder / LOCK_NAME)
    try:
        lock.acquire(timeout=_PATIENCE)
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


@contextmanager
def hold_folder(folder: Path, signs: Collection[str], what: str) -> Iterator[None]:
    """Make `folder` or open one made earlier, and hold it for writing, swept of what a killed run left half-written.

    signs: names of which an earlier one holds at least one; a folder that holds none of them, but something else, is not
    ours and stays as it is. what: it, for the message. Raises ArtifactError for such a folder or one that cannot be
    written, LockedError if another process has it.
    """
    is_new = not folder.exists()
    prepare_folder(folder, sweep=False)  # another process may be writing here: that is for the lock to say
    names = contents_of(folder)
    if names and not set(signs) & set(names):
        raise ArtifactError(f"`{folder}` is not empty and holds no {what}: {names[0]!r}", "choose another --out")
    with lock_folder(folder):
        prepare_folder(folder)
        try:
            yield
        except BaseException:
            if is_new and not contents_of(folder):
                shutil.rmtree(folder, ignore_errors=True)  # nothing came of it
            raise


def is_locked(folder: Path) -> bool:
    """Say whether a process holds `folder` for writing now. Changes nothing; a lock that cannot be tried counts as free."""
    path = folder / LOCK_NAME
    lock = FileLock(path)
    try:
        if path.is_file():
            lock.acquire(timeout=0)
    except Timeout:
        return True
    except OSError:  # not ours to open
        return False
    finally:
        lock.release()
    return False


def contents_of(folder: Path) -> list[str]:
    """The sorted names of what lies in a folder, without its lock and what a killed run left half-written."""
    names = (entry.name for entry in folder.iterdir())
    return sorted(name for name in names if not name.startswith((LOCK_NAME, TEMPORARY_PREFIX)))


def _owner(folder: Path) -> str:
    try:
        owner = json.loads((folder / _OWNER_NAME).read_text(encoding="utf-8"))
        return f"process {owner['pid']} on {owner['host']} since {owner['since']}"
    except (OSError, ValueError, KeyError):
        return "another process"
