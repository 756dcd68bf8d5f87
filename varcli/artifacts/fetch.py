"""Files from the network: fetched once, with resume, retries and a checksum that is pinned on first use.

Beside `name` lie, while it is fetched, `name.part` and `name.part.json` (which version the part belongs to), and
afterwards `name.pin.json` with size and SHA-256 of what was fetched first.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from varcli import __version__
from varcli.artifacts.lock import lock_folder
from varcli.artifacts.manifest import FileEntry, hash_file
from varcli.artifacts.verify import read_json
from varcli.artifacts.write import prepare_folder, publish_file, write_json
from varcli.errors import ArtifactError, IntegrityError, LockedError
from varcli.progress import OnStep, Step, ignore

CACHE_VARIABLE = "VARCLI_CACHE"
_CHUNK = 2**20  # bytes read at a time
_LOCK_PAUSE = 0.2  # seconds between looks at whether another process has finished
_DROPPED = (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError)


def cache_folder() -> Path:
    """Return where fetched files are kept: $VARCLI_CACHE, else varcli/ in the user's cache folder."""
    if os.environ.get(CACHE_VARIABLE):
        return Path(os.environ[CACHE_VARIABLE])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "varcli"


def fetch(
    url: str,
    target: Path,
    *,
    sha256: str | None = None,
    headers: Mapping[str, str] | None = None,
    check: Callable[[Path], None] | None = None,
    attempts: int = 5,
    timeout: float = 30.0,
    pause: float = 1.0,
    on_step: OnStep = ignore,
) -> FileEntry:
    """Fetch `url` to `target` unless it is there, and return its size and hash.

    sha256: what the file must hash to; None takes what was fetched the first time and pins it. headers: sent to `url`
    and not to where it redirects, so that a token stays with its server. check: raises what it finds wrong with a file
    before it is pinned. attempts: connections in a row that may bring nothing. timeout: seconds without a byte. pause:
    seconds before the first retry, doubled each time.
    A dropped connection goes on where it stopped, also in a later call. Where another process fetches into the same
    folder, this one waits for it. Raises ArtifactError if the file cannot be had, IntegrityError if it is not the one
    expected, and what `check` raises; then nothing new is left at `target`.
    """
    if urllib.parse.urlsplit(url).scheme not in ("http", "https"):
        raise ArtifactError(f"`{url}` is not an http or https address")
    if target.is_file() and pinned(target):
        return _verify(target, sha256)  # without the lock, so that many processes can hash it at once
    folder = prepare_folder(target.parent, sweep=False)
    with contextlib.ExitStack() as stack:
        _wait_for_lock(folder, stack, on_step)
        known = pinned(target)
        expected = sha256 or (known.sha256 if known else None)
        if target.is_file():
            entry = _verify(target, sha256)
            if known is None and check is not None:
                check(target)
            return entry if known == entry else pin(target, entry, url)
        part = _part_file(target)
        _download(url, part, headers or {}, attempts, timeout, pause, on_step)
        entry = hash_file(part)
        if expected not in (None, entry.sha256):
            part.unlink()
            raise IntegrityError(
                f"what `{url}` gave has SHA-256 {entry.sha256[:12]}..., but {expected[:12]}... is expected",
                "it was changed on its server or on the way: do not use it",
            )
        if known is None and check is not None:
            try:
                check(part)
            except Exception:
                part.unlink()
                raise
        publish_file(part, target)
        _version_file(part).unlink(missing_ok=True)
        return pin(target, entry, url)


def fetched_bytes(target: Path) -> int:
    """Return how much of `target` earlier calls of `fetch` brought: all of it, a part, or 0."""
    return max((path.stat().st_size for path in (target, _part_file(target)) if path.is_file()), default=0)


def pinned(target: Path) -> FileEntry | None:
    """Return size and SHA-256 of what `target` was when it was fetched first, None if it never was."""
    if not pin_file(target).exists():
        return None
    value: Any = read_json(pin_file(target))
    try:
        return FileEntry(size=int(value["size"]), sha256=str(value["sha256"]))
    except (KeyError, TypeError, ValueError):
        raise ArtifactError(f"`{pin_file(target)}` is damaged", "delete it to trust what is fetched next") from None


def pin(target: Path, entry: FileEntry, url: str) -> FileEntry:
    """Note that `target`, from `url`, is `entry` from now on; return it. `target` itself need not be there."""
    write_json(pin_file(target), {"url": url, "size": entry.size, "sha256": entry.sha256})
    return entry


def pin_file(target: Path) -> Path:
    """Return the file that holds the pin of `target`."""
    return target.with_name(target.name + ".pin.json")


def _verify(target: Path, sha256: str | None) -> FileEntry:
    """Hash a file that is there. Raises IntegrityError if it is not the one expected."""
    entry, known = hash_file(target), pinned(target)
    expected = sha256 or (known.sha256 if known else entry.sha256)
    if expected != entry.sha256:
        raise IntegrityError(
            f"`{target}` has SHA-256 {entry.sha256[:12]}..., but {expected[:12]}... is expected",
            "delete it to fetch it again",
        )
    return entry


def _wait_for_lock(folder: Path, stack: contextlib.ExitStack, on_step: OnStep) -> None:
    """Hold `folder` for the length of `stack`; a lock dies with its process, so the wait ends."""
    told = False
    while True:
        try:
            stack.enter_context(lock_folder(folder))
            return
        except LockedError:
            if not told:
                on_step(Step(0, None, unit="bytes", message=f"waiting for another process that fetches into {folder}"))
            told = True
            time.sleep(_LOCK_PAUSE)


def _download(
    url: str, part: Path, headers: Mapping[str, str], attempts: int, timeout: float, pause: float, on_step: OnStep
) -> None:
    """Bring `part` to its full length, however often the connection drops."""
    failures = 0
    while True:
        before = part.stat().st_size if part.exists() else 0
        try:
            if _receive(url, part, headers, timeout, on_step):
                return
            reason: Exception | str = "the connection was closed early"
        except urllib.error.HTTPError as error:
            if error.code == 416 and before:  # the part is as long as the file, or longer: begin anew
                part.unlink()
            elif error.code < 500:
                raise ArtifactError(
                    f"cannot fetch `{url}`: {error.code} {error.reason}", "is the address right?"
                ) from None
            reason = error
        except _DROPPED as error:
            reason = error
        after = part.stat().st_size if part.exists() else 0
        failures = 0 if after > before else failures + 1
        if failures >= attempts:
            raise ArtifactError(
                f"cannot fetch `{url}`: {reason}; {after / 1e6:.1f} MB are kept",
                "run the same command again to go on, or pass a file that you fetched yourself",
            ) from None
        on_step(Step(after, None, unit="bytes", message=f"connection lost ({reason}), trying again"))
        time.sleep(pause * 2**failures)


def _receive(url: str, part: Path, own_headers: Mapping[str, str], timeout: float, on_step: OnStep) -> bool:
    """Append what the server sends; say whether the file is whole."""
    done = part.stat().st_size if part.exists() else 0
    version = _read_version(part) if done else None
    headers = {"User-Agent": f"varcli/{__version__}", "Accept-Encoding": "identity"}
    if done and version:
        headers |= {"Range": f"bytes={done}-", "If-Range": version}
    request = urllib.request.Request(url, headers=headers)
    for name, value in own_headers.items():
        request.add_unredirected_header(name, value)
    with urllib.request.urlopen(request, timeout=timeout) as response:
        if response.status != 206:
            done = 0  # the server sends all of it, or another version: begin anew
        length = response.headers.get("Content-Length")
        total = done + int(length) if length is not None else None
        if done == 0:
            write_json(
                _version_file(part), {"version": response.headers.get("ETag") or response.headers.get("Last-Modified")}
            )
            prepare_folder(part.parent, need_bytes=total or 0, sweep=False)
        with open(part, "ab" if done else "wb") as file:
            while chunk := response.read(_CHUNK):
                file.write(chunk)
                done += len(chunk)
                on_step(Step(done, total, unit="bytes"))
    return total is None or done == total


def _version_file(part: Path) -> Path:
    return part.with_name(part.name + ".json")


def _read_version(part: Path) -> str | None:
    try:
        value = read_json(_version_file(part))
    except ArtifactError:
        return None
    version = value.get("version") if isinstance(value, dict) else None
    return version if isinstance(version, str) else None


def _part_file(target: Path) -> Path:
    return target.with_name(target.name + ".part")
