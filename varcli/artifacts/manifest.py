"""The manifest: the last file written into a folder, which says what it is and what each file must hash to."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from varcli import __version__
from varcli.artifacts.write import write_json

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
PLAN_NAME = ".plan.json"  # what stands for the manifest while codes or samples are written

_HASH_THREADS = 8  # hashing itself leaves Python's lock; with more, taking it costs what they gain
_HASH_CHUNK = 64  # files a thread hashes before it asks for more; one at a time, two threads are no faster than one


@dataclass(frozen=True)
class FileEntry:
    """Size in bytes and SHA-256 of one file, as lower-case hex."""

    size: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a folder holds. A folder without one, or whose files differ from it, is not finished."""

    kind: str  # "codes", "tokenizer", "transformer", "checkpoint", "samples", ...
    files: dict[str, FileEntry]  # plain file names in the same folder
    info: dict[str, Any]  # JSON values whose keys depend on the kind
    made_by: dict[str, Any] = field(default_factory=dict)  # varcli and torch version, command, platform
    format_version: int = FORMAT_VERSION

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object that `manifest.json` holds."""
        return {
            "format_version": self.format_version,
            "kind": self.kind,
            "made_by": self.made_by,
            "info": self.info,
            "files": {name: {"size": entry.size, "sha256": entry.sha256} for name, entry in self.files.items()},
        }

    @property
    def digest(self) -> str:
        """SHA-256 of kind, info and files as canonical JSON: the same content made twice has the same digest."""
        return digest_json({key: value for key, value in self.to_json().items() if key != "made_by"})


def digest_json(value: Any) -> str:
    """SHA-256 of a JSON value in canonical form (sorted keys, no spaces), as lower-case hex."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def hash_file(path: Path) -> FileEntry:
    """Return size and SHA-256 of a file, read in chunks."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return FileEntry(size=file.tell(), sha256=digest)


def hash_files(paths: Sequence[Path]) -> list[FileEntry]:
    """Return what `hash_file` returns for each of many files, several at a time."""
    size = max(1, min(_HASH_CHUNK, len(paths) // _HASH_THREADS))
    chunks = [paths[start : start + size] for start in range(0, len(paths), size)]
    with ThreadPoolExecutor(_HASH_THREADS) as pool:
        return [
            entry for found in pool.map(lambda chunk: [hash_file(path) for path in chunk], chunks) for entry in found
        ]


def write_manifest(
    folder: Path,
    kind: str,
    info: Mapping[str, Any],
    files: Iterable[str] = (),
    known: Mapping[str, FileEntry] | None = None,
) -> Manifest:
    """Write `folder/manifest.json`, the step that makes the folder whole, and return it.

    files: names to hash now. known: entries hashed when they were written, so that a long job does not read
    everything twice.
    """
    entries = dict(known or {})
    names = list(files)
    entries.update(zip(names, hash_files([folder / name for name in names]), strict=True))
    manifest = Manifest(kind=kind, files=entries, info=dict(info), made_by=describe_process())
    write_json(folder / MANIFEST_NAME, manifest.to_json())
    return manifest


def describe_process() -> dict[str, Any]:
    """Say what makes an artefact: varcli and torch versions, platform, and the command without home paths."""
    home = os.path.expanduser("~")
    command = [Path(sys.argv[0]).name, *sys.argv[1:]]
    return {
        "varcli": __version__,
        "torch": _version("torch"),
        "python": platform.python_version(),
        "platform": f"{platform.system()}-{platform.machine()}",
        "command": [argument.replace(home, "~") if len(home) > 1 else argument for argument in command],
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
