"""Run folders as they lie on disk, read without torch: what a run was begun with, and its log.

runs/d16/config.json      {"kind": "transformer", "config": {...}, "inputs": {...}, "made_by": {...}}
runs/d16/metrics.jsonl    one JSON object a line, see `varcli.training.runlog`
runs/d16/checkpoints/     and, once there are weights to use, transformer/ or tokenizer/
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from varcli.artifacts.lock import is_locked
from varcli.artifacts.verify import is_artifact, read_json, read_json_lines, read_manifest, unfinished_kind
from varcli.data.paths import escape_path
from varcli.errors import ArtifactError, DataError, unknown_name

CONFIG_NAME = "config.json"
LOG_NAME = "metrics.jsonl"
RUN_ROOTS = (Path("runs"), Path("tokenizers"))
"""Where `varcli train` and `varcli train-tokenizer` put runs that are given a name only."""

_MAX_DEPTH = 4  # folders below the one that is searched
_MODEL_PARTS = ("tokenizer", "transformer")
_PARTS = {"checkpoints", "transformer", "tokenizer", "samples", "tensorboard"}  # of runs and models, never runs


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """What one run folder holds."""

    folder: Path
    kind: str  # "transformer" or "tokenizer": what is trained
    config: dict[str, Any]  # the settings it was begun with
    inputs: dict[str, Any]  # what else decides its numbers, such as fingerprints
    made_by: dict[str, Any]  # versions and the command
    log: list[dict[str, Any]]  # lines of metrics.jsonl
    last_write: float | None  # when its log was written last, seconds since 1970; None without one
    is_running: bool  # a process holds the folder now

    @property
    def name(self) -> str:
        """The folder, on one printable line."""
        return escape_path(self.folder.as_posix())

    def lines(self, kind: str) -> list[dict[str, Any]]:
        """The log's lines of one kind: "train", "validation", "evaluation" or "event"."""
        return [record for record in self.log if record.get("kind") == kind]


def read_log(run: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """Read a run's metrics, or only the lines of one kind. A torn last line is left out."""
    return [record for record in read_json_lines(run / LOG_NAME) if kind is None or record.get("kind") == kind]


def read_run(folder: Path) -> RunRecord:
    """Read a run folder, finished or not. Raises ArtifactError, saying what is wrong, if it is none or damaged."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ArtifactError(f"`{folder}` does not exist" if not folder.exists() else f"`{folder}` is not a folder")
    is_running = is_locked(folder)
    if not is_run(folder):
        raise ArtifactError(f"`{folder}` is no run: {_what(folder, is_running)}")
    stored = read_json(folder / CONFIG_NAME)
    if not (isinstance(stored, dict) and isinstance(stored.get("config"), dict)):
        raise ArtifactError(f"`{folder / CONFIG_NAME}` is not a run's config", "it was damaged or edited")
    path = folder / LOG_NAME
    try:
        log, last_write = read_log(folder), path.stat().st_mtime if path.exists() else None
    except OSError as error:
        raise ArtifactError(f"cannot read `{path}`: {error.strerror}") from None
    inputs, made_by = (stored.get(name) for name in ("inputs", "made_by"))
    return RunRecord(
        folder=folder,
        kind=str(stored.get("kind")),
        config=stored["config"],
        inputs=inputs if isinstance(inputs, dict) else {},
        made_by=made_by if isinstance(made_by, dict) else {},
        log=[record for record in log if _is_counted(record)],
        last_write=last_write,
        is_running=is_running,
    )


def is_run(folder: Path) -> bool:
    """Say whether a folder is that of a run, whole or damaged."""
    return (folder / CONFIG_NAME).is_file() or ((folder / LOG_NAME).is_file() and (folder / "checkpoints").is_dir())


def require_no_artifact(folder: Path) -> None:
    """Raise DataError, saying what it is, if `folder` is what varcli wrote, such as a run, where images are needed.

    So are codes or samples that are not finished: they may hold images, but neither all nor in folders of classes.
    """
    folder = Path(folder)
    hint = "pass ROOT with the images, as ROOT/CLASS/IMAGE"
    begun = unfinished_kind(folder)
    if begun is not None:
        what, hint = f"an unfinished {begun} folder", f"{hint}; the command that began this one goes on with it"
    elif _can_be_read(read_run, folder):
        what = "a run"
    elif _can_be_read(read_manifest, folder):
        what = f"a {read_manifest(folder).kind} folder"
    elif any(_can_be_read(read_manifest, folder / name) for name in _MODEL_PARTS):
        what = "a model"
    else:
        return
    raise DataError(f"`{escape_path(str(folder))}` is {what} of varcli, but a folder of images is needed", hint)


def find_runs(root: Path) -> tuple[list[Path], dict[Path, str]]:
    """Return the run folders at or below `root`, and what else lies there: folders without a run, and what they are.

    Hidden folders are passed over; links are followed, a few folders deep. Raises ArtifactError if `root` is no folder
    that can be read.
    """
    root = Path(root)
    if not root.is_dir():
        raise ArtifactError(f"`{root}` does not exist" if not root.exists() else f"`{root}` is not a folder")
    if is_run(root):
        return [root], {}
    runs: list[Path] = []
    others: dict[Path, str] = {}
    try:
        entries = _folders(root)
    except OSError as error:
        raise ArtifactError(f"cannot read `{root}`: {error.strerror}") from None
    for entry in entries:
        try:
            below = list(_search(entry, _MAX_DEPTH))
        except OSError as error:
            others[entry] = f"it cannot be read: {error.strerror}"
            continue
        runs += below
        if not below:
            others[entry] = _what(entry, is_locked(entry))
    if not runs and (is_artifact(root) or unfinished_kind(root) is not None):
        others[root] = _what(root, is_locked(root))
    return runs, others


def resolve_run(name: str | Path) -> Path:
    """Return the folder that a path, or the name of a run in runs/ or tokenizers/, means.

    Raises ArtifactError, naming runs of similar names, if there is none.
    """
    choices = [Path(name), *(root / name for root in RUN_ROOTS)]
    found = next((choice for choice in choices if is_run(choice)), Path(name))
    if found.exists():
        return found
    known = [run.relative_to(root) for root in RUN_ROOTS if root.is_dir() for run in find_runs(root)[0]]
    raise unknown_name("run or folder", str(name), [escape_path(run.as_posix()) for run in known], ArtifactError)


def numbers_of(records: Iterable[Mapping[str, Any]], name: str) -> list[tuple[int, float]]:
    """The (step, value) pairs of one number of some lines; what was no number is text in the log, and left out."""
    found = ((record["step"], record.get(name)) for record in records)
    return [(int(step), float(value)) for step, value in found if is_number(value)]


def is_number(value: Any) -> bool:
    """Say whether an entry of a log is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_counted(record: Mapping[str, Any]) -> bool:
    """Whether a line says after which step it was written, as all do that varcli wrote."""
    return is_number(record.get("step"))


def _can_be_read(read: Callable[[Path], object], folder: Path) -> bool:
    try:
        read(folder)
    except ArtifactError:
        return False
    return True


def _search(folder: Path, depth: int) -> Iterator[Path]:
    if is_run(folder):
        yield folder
    elif depth:
        for entry in _folders(folder):
            if entry.name not in _PARTS:
                yield from _search(entry, depth - 1)


def _folders(root: Path) -> list[Path]:
    return sorted(entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _what(folder: Path, is_running: bool) -> str:
    """Say what a folder is that holds no run."""
    if is_running:
        return "it is being begun, or written by another command"
    parts = [name for name in _MODEL_PARTS if is_artifact(folder / name)]
    try:
        begun = unfinished_kind(folder)
        if begun is not None:
            return f"it is an unfinished {begun} folder"
        if is_artifact(folder):
            return f"it is a {read_manifest(folder).kind} folder"
        if parts:
            return f"it is a model folder with {' and '.join(parts)}, and no {CONFIG_NAME}"
        return "it holds no config.json" if any(folder.iterdir()) else "it is empty"
    except ArtifactError as error:
        return str(error)
    except OSError as error:
        return f"it cannot be read: {error.strerror}"
