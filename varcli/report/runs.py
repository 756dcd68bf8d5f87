"""What runs have come to: one summary each, and what sets several of them apart."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from varcli.artifacts.verify import read_json, read_tensor_header
from varcli.config import flatten
from varcli.data.paths import escape_path
from varcli.data.runs import RUN_ROOTS, RunRecord, find_runs, is_number, numbers_of, read_run
from varcli.errors import ArtifactError, ConfigError
from varcli.report.describe import count_weights

_RATE_LINES = 20  # newest log lines whose median is the rate
_PER_SCALE = "_scale"  # in names of numbers that each scale has one of
_UNIMPORTANT = {"seconds", "images", "epoch"}  # numbers of a log line that are told otherwise or say nothing of a run


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """One line of the list of runs. None is what a run does not have, or not yet."""

    name: str  # its folder
    kind: str  # "transformer" or "tokenizer"
    state: str  # "running", "finished" or "stopped"
    depth: int | None  # blocks of a transformer
    width: int | None  # channels: of the residual stream, or of a tokenizer's first level
    parameters: int | None  # of the weights there are to use
    step: int  # optimizer steps in its log or newest checkpoint
    steps: int | None  # of the whole run
    loss: float | None  # of the last training line
    best_loss: float | None  # lowest validation loss
    best_step: int | None  # after how many steps that was
    images_per_second: float | None  # of late
    seconds: float | None  # spent training, over all resumptions
    last_write: float | None  # of its log, seconds since 1970


def list_runs(roots: Sequence[Path] | None = None) -> tuple[list[RunSummary], dict[str, str]]:
    """Summarise the runs at or below some folders, newest log first, and say of all else there what it is.

    roots: None takes those of runs/ and tokenizers/ that are there. A run that cannot be read is among the second.
    Raises ArtifactError for a root that is no folder.
    """
    chosen = [root for root in RUN_ROOTS if root.is_dir()] if roots is None else roots
    summaries: dict[str, RunSummary] = {}
    others: dict[str, str] = {}
    for root in chosen:
        folders, foreign = find_runs(root)
        others |= {escape_path(folder.as_posix()): what for folder, what in foreign.items()}
        for folder in folders:
            try:
                summary = summarize(read_run(folder))
                summaries[summary.name] = summary
            except ArtifactError as error:
                others[escape_path(folder.as_posix())] = str(error)
    newest_first = sorted(summaries.values(), key=lambda summary: summary.last_write or 0.0, reverse=True)
    return newest_first, others


def summarize(run: RunRecord) -> RunSummary:
    """Bring a run down to one line."""
    train, validation = run.lines("train"), run.lines("validation")
    best = min(numbers_of(validation, "loss"), key=lambda pair: pair[1], default=(None, None))
    losses, rates = numbers_of(train, "loss"), numbers_of(train, "images_per_second")
    seconds = numbers_of(train, "seconds")
    step = max([int(record["step"]) for record in run.log] + [_checkpoint_step(run.folder)])
    depth, width, steps = (_whole(run.config.get(name)) for name in ("depth", "width", "steps"))
    if isinstance(run.config.get("tokenizer"), Mapping):
        width = _whole(run.config["tokenizer"].get("width"))
    elif width is None and depth is not None:
        width = 64 * depth  # as TrainConfig has it
    done = "finished" if steps is not None and step >= steps else "stopped"
    return RunSummary(
        name=run.name,
        kind=run.kind,
        state="running" if run.is_running else done,
        depth=depth,
        width=width,
        parameters=_parameters(run),
        step=step,
        steps=steps,
        loss=losses[-1][1] if losses else None,
        best_loss=best[1],
        best_step=best[0],
        images_per_second=statistics.median(rate for _, rate in rates[-_RATE_LINES:]) if rates else None,
        seconds=seconds[-1][1] if seconds else None,
        last_write=run.last_write,
    )


def read_runs(folders: Iterable[Path]) -> list[RunRecord]:
    """Read runs to hold against one another. Raises ArtifactError for one that is none, ConfigError for one named twice."""
    runs = [read_run(folder) for folder in folders]
    seen: dict[Path, str] = {}
    for run in runs:
        other = seen.setdefault(run.folder.resolve(), run.name)
        if other is not run.name:
            raise ConfigError(f"`{run.name}` is `{other}` again", "name each run once")
    return runs


def differences(runs: Sequence[RunRecord]) -> dict[str, list[Any]]:
    """Return the settings that are not the same in all runs, with the value of each; None where a run has no such setting.

    Settings of tables are named as `--set` names them, e.g. tokenizer.width; inputs and versions come after the config. Of
    runs of different kinds, those that all have are compared.
    """
    sides = []
    for run in runs:
        versions = {name: run.made_by.get(name) for name in ("varcli", "torch")}
        inputs = {f"inputs.{name}": value for name, value in flatten(run.inputs).items()}
        sides.append({"kind": run.kind, **flatten(run.config), **inputs, **versions})
    names = dict.fromkeys(name for side in sides for name in side)
    if len({run.kind for run in runs}) > 1:
        names = {name: None for name in names if all(name in side for side in sides)}
    found = {name: [side.get(name) for side in sides] for name in names}
    return {name: values for name, values in found.items() if any(value != values[0] for value in values)}


def final_numbers(runs: Sequence[RunRecord]) -> dict[str, list[float | None]]:
    """Return what runs have come to side by side: cost, last training loss, best and last validation, last evaluation."""
    columns = []
    for run in runs:
        summary = summarize(run)
        batch = _whole(run.config.get("batch_size"))
        column: dict[str, float | None] = {
            "parameters": summary.parameters,
            "steps": summary.step,
            "images seen": None if batch is None else summary.step * batch,
            "hours of training": None if summary.seconds is None else summary.seconds / 3600,
            "images/s": summary.images_per_second,
            "training loss": summary.loss,
            "best validation loss": summary.best_loss,
            "best after step": summary.best_step,
        }
        for kind in ("validation", "evaluation"):
            for name, value in (run.lines(kind) or [{}])[-1].items():
                if is_number(value) and name not in ("step", *_UNIMPORTANT) and _PER_SCALE not in name:
                    finest = ", finest scale" if name.endswith("_last") else ""
                    column[f"{kind} {name.removesuffix('_last').replace('_', ' ')}{finest}"] = value
        columns.append(column)
    names = dict.fromkeys(name for column in columns for name in column)
    rows = {name: [column.get(name) for column in columns] for name in names}
    return {name: row for name, row in rows.items() if any(value is not None for value in row)}


def to_json(summary: RunSummary) -> dict[str, Any]:
    """A summary as JSON values."""
    return dataclasses.asdict(summary)


def _whole(value: Any) -> int | None:
    return int(value) if is_number(value) else None


def _checkpoint_step(folder: Path) -> int:
    try:
        return int(str(read_json(folder / "latest.json")["checkpoint"]).removeprefix("step-"))
    except (ArtifactError, KeyError, TypeError, ValueError):
        return 0


def _parameters(run: RunRecord) -> int | None:
    """Count the weights that the run has published."""
    if run.kind not in ("transformer", "tokenizer"):
        return None
    try:
        return count_weights(read_tensor_header(run.folder / run.kind / "weights.safetensors"))
    except (ArtifactError, OSError):
        return None
