"""Released models by name: fetched, pinned, and imported as `varcli import` does it."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from varcli.artifacts.fetch import CACHE_VARIABLE, cache_folder, fetch, fetched_bytes, pin, pin_file, pinned
from varcli.artifacts.lock import hold_folder
from varcli.artifacts.manifest import FileEntry
from varcli.artifacts.verify import is_artifact, read_manifest, verify_folder
from varcli.artifacts.write import prepare_folder
from varcli.errors import ArtifactError, IntegrityError, LockedError, unknown_name
from varcli.interop.hub import HubFile, ask_hub, find_cached, hash_cached
from varcli.interop.releases import RELEASES, Release
from varcli.progress import OnStep, Step, ignore

MODELS = Path("models")
_PAUSE = 1.0  # seconds before a server that failed is asked again


@dataclass(frozen=True, kw_only=True)
class PullResult:
    """What a pull found or wrote."""

    name: str
    folder: Path  # the model folder
    is_new: bool  # False if it was there and whole already
    release: Release
    sha256: dict[str, str]  # of the released files the model was made from, by file name
    downloads: Path  # where fetched files are kept; the model does not need them any more


@dataclass(frozen=True, kw_only=True)
class _Wanted:
    """One released file and where its bytes are to come from."""

    target: Path  # in the folder of downloads
    known: FileEntry | None  # what it was the first time
    local: Path | None  # already on this machine
    remote: HubFile | None  # what the server has, asked only if nothing is on this machine

    @property
    def size(self) -> int:
        if self.local is not None:
            return self.local.stat().st_size
        return self.remote.size if self.remote else 0

    @property
    def missing(self) -> int:
        """Bytes still to come."""
        return 0 if self.local is not None else max(self.size - fetched_bytes(self.target), 0)


def pull_model(name: str, out: Path | None = None, *, on_step: OnStep = ignore) -> PullResult:
    """Fetch a released tokenizer and transformer and write them as the model folder `out`.

    name: a key of RELEASES. out: None is models/`name`. on_step: told licence, sizes and places before anything is
    fetched, then bytes, then parts. A model that is there and whole is left alone; what an interrupted call fetched is
    kept, and the next goes on. Each file is pinned to the SHA-256 that it had the first time, and read as any file of
    others: nothing in it is run.
    Raises ConfigError for another name; ArtifactError if a file cannot be had, there is no room, or `out` holds another
    model; IntegrityError if a file is not the one that the Hub names or that was pinned; the errors of `import_official`.
    """
    from varcli.interop.folders import import_official

    if name not in RELEASES:
        raise unknown_name("released model", name, RELEASES)
    release = RELEASES[name]
    out = MODELS / name if out is None else Path(out)
    downloads = cache_folder() / "releases" / release.repo.replace("/", "--")
    pins = {file: pinned(downloads / file) for file in release.files.values()}
    there = _sources(out, release, pins)
    if there.keys() == release.files.keys():
        sha256 = {release.files[part]: there[part] for part in there}
        return PullResult(name=name, folder=out, is_new=False, release=release, sha256=sha256, downloads=downloads)
    if out.exists():
        with hold_folder(out, release.files, "model"):
            pass  # another's folder is refused now, not after everything was fetched
    by_hand = (
        f"run the same command again to go on, or fetch {release.tokenizer} and {release.transformer} from "
        f"{release.source} by hand, then: varcli import {release.tokenizer} {release.transformer} --out {shlex.quote(str(out))}"
    )
    try:
        wanted = [_locate(release, downloads / file, pins[file], on_step) for file in release.files.values()]
    except ArtifactError as error:
        raise _with_hint(error, by_hand) from error
    _require_room(wanted, out, downloads)
    done, total = sum(entry.size - entry.missing for entry in wanted), sum(entry.size for entry in wanted)
    on_step(Step(done, total, unit="bytes", message=_describe(name, release, wanted, out, downloads)))
    try:
        entries = _bring(wanted, total, release, on_step)
    except ArtifactError as error:
        raise _with_hint(error, by_hand) from error
    paths = [entry.local or entry.target for entry in wanted]
    import_official(paths, out, {"depth": release.depth, "image_size": release.side}, on_step=on_step)
    sha256 = {file: entry.sha256 for file, entry in entries.items()}
    return PullResult(name=name, folder=out, is_new=True, release=release, sha256=sha256, downloads=downloads)


def _sources(out: Path, release: Release, pins: dict[str, FileEntry | None]) -> dict[str, str]:
    """Return the SHA-256 of the released file of each part that `out` holds whole.

    Raises ArtifactError if a part was made from something else, IntegrityError if it is damaged.
    """
    found = {}
    for part, file in release.files.items():
        folder = out / part
        if not is_artifact(folder):
            continue
        manifest = read_manifest(folder, part)
        source = manifest.info.get("source")
        source = source if isinstance(source, dict) else {}
        known = pins[file]
        if source.get("file") != file or (known is not None and source.get("sha256") != known.sha256):
            raise ArtifactError(
                f"`{folder}` exists and was not made from {release.repo}'s {file}", "choose another --out"
            )
        if problems := verify_folder(folder, manifest):
            raise IntegrityError(f"`{folder}` is damaged: {problems[0]}", "delete it and run the same command again")
        found[part] = str(source.get("sha256"))
    return found


def _locate(release: Release, target: Path, known: FileEntry | None, on_step: OnStep) -> _Wanted:
    """Find a file on this machine, else ask the Hub about it. Raises IntegrityError if it is not the pinned one."""
    local = target if target.is_file() else find_cached(release.repo, target.name, release.revision)
    if local is not None:
        return _Wanted(target=target, known=known, local=local, remote=None)
    remote = ask_hub(release.repo, target.name, release.revision, pause=_PAUSE, on_step=on_step)
    if known is not None and (remote.size, remote.sha256 or known.sha256) != (known.size, known.sha256):
        raise IntegrityError(
            f"{target.name} of {release.repo} is another file than the one fetched first: {remote.size:,} bytes with "
            f"SHA-256 {(remote.sha256 or 'unknown')[:12]}, not {known.size:,} bytes with {known.sha256[:12]}",
            f"somebody replaced it; if you trust the new one, delete `{pin_file(target)}`",
        )
    return _Wanted(target=target, known=known, local=None, remote=remote)


def _require_room(wanted: list[_Wanted], out: Path, downloads: Path) -> None:
    """Raise ArtifactError unless both folders can be written and hold what will come."""
    place = out if out.exists() else out.parent
    missing, size = sum(entry.missing for entry in wanted), sum(entry.size for entry in wanted)
    try:
        prepare_folder(downloads, need_bytes=missing, sweep=False)
    except ArtifactError as error:
        raise ArtifactError(str(error), f"free some space, or name another folder with {CACHE_VARIABLE}") from None
    prepare_folder(place, sweep=False)
    shared = missing if place.stat().st_dev == downloads.stat().st_dev else 0
    prepare_folder(place, need_bytes=shared + size, sweep=False)  # safetensors are as large as what they are made from


def _describe(name: str, release: Release, wanted: list[_Wanted], out: Path, downloads: Path) -> str:
    lines = [f"{name}, {release.side} px: {release.licence} licence, from {release.source}"]
    for entry in wanted:
        if entry.local is not None:
            place = f"found in {entry.local.parent}"
        elif entry.missing < entry.size:
            place = f"{entry.missing / 1e6:,.1f} MB still to fetch"
        else:
            place = "to fetch"
        lines.append(f"  {entry.target.name}  {entry.size / 1e6:,.1f} MB, {place}")
    return "\n".join([*lines, f"downloads are kept in {downloads}; the model goes to {out}"])


def _bring(wanted: list[_Wanted], total: int, release: Release, on_step: OnStep) -> dict[str, FileEntry]:
    """Fetch and pin what is missing, check what is there; return each file's size and hash by its name."""
    entries: dict[str, FileEntry] = {}
    before = 0
    for file in wanted:
        if file.remote is not None:
            entry = fetch(
                file.remote.url,
                file.target,
                sha256=file.known.sha256 if file.known else file.remote.sha256,
                headers=file.remote.headers,
                pause=_PAUSE,
                on_step=_shifted(on_step, before, total),
            )
        else:
            entry = hash_cached(file.local)
            if file.known is None:
                pin(file.target, entry, f"{release.source} ({file.target.name})")
            elif file.known != entry:
                raise IntegrityError(
                    f"`{file.local}` has SHA-256 {entry.sha256[:12]}..., but {file.known.sha256[:12]}... was fetched first",
                    f"it was damaged or replaced: delete `{file.local.resolve()}` to fetch it again",
                )
        entries[file.target.name] = entry
        before += file.size
    return entries


def _shifted(on_step: OnStep, before: int, total: int) -> OnStep:
    """Report the bytes of one file as part of those of all."""
    return lambda step: on_step(Step(before + step.done, total, unit="bytes", message=step.message))


def _with_hint(error: ArtifactError, hint: str) -> ArtifactError:
    """Return `error` with what to do about a file that cannot be had; others have hints of their own."""
    return error if isinstance(error, IntegrityError | LockedError) else ArtifactError(str(error), hint)
