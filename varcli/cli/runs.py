"""`varcli runs`: which runs there are, how far they are, and what sets them apart."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from varcli.cli import console
from varcli.cli.options import JsonOption

if TYPE_CHECKING:
    from varcli.report.runs import RunSummary

_WIDTH = 40  # characters of a setting's value; longer ones end in dots, and --json has them whole
_PLOT = Path("compared.png")


def runs(
    places: Annotated[
        list[Path] | None,
        Argument(
            metavar="[FOLDER | RUN RUN ...]",
            help="A folder to list, or runs to compare, by path or by name in runs/; default: list runs/ and tokenizers/.",
            show_default=False,
        ),
    ] = None,
    over: Annotated[
        str, Option("--over", help="Axis of the loss plot: steps, hours of training, or images.")
    ] = "steps",
    out: Annotated[
        Path | None,
        Option("--out", "-o", help="PNG of the loss plot of a comparison; default: compared.png.", show_default=False),
    ] = None,
    json: JsonOption = False,
) -> None:
    """List runs, newest first, or compare several: settings that differ, numbers, a loss plot.

    All of it is read from the run folders, also while they are being trained.
    """
    from varcli.data.runs import is_run, resolve_run
    from varcli.errors import ConfigError
    from varcli.report.compare import AXES

    if over not in AXES:
        from varcli.errors import unknown_name

        raise unknown_name("axis", over, AXES)
    folders = [resolve_run(place) for place in places or ()]
    if len(folders) > 1 and any(is_run(folder) for folder in folders):
        _compare(folders, over, out or _PLOT, json)
        return
    if out is not None:
        raise ConfigError("`--out` is for comparing runs", "name two runs or more; `varcli curves RUN` draws one")
    _list(folders or None, json)


def _list(roots: list[Path] | None, json: bool) -> None:
    from varcli.report.runs import list_runs, to_json

    found, others = list_runs(roots)
    now = time.time()
    if json:
        rows = [{**to_json(run), "age_seconds": _age(run, now)} for run in found]
        console.json_result({"runs": rows, "others": others})
        return
    if found:
        console.table(_COLUMNS, [_row(run, now) for run in found])
    elif not others:
        console.result(f"no runs in {', '.join(map(str, roots)) if roots else 'runs/ or tokenizers/'}")
    for name, what in others.items():
        console.note(f"{name}: {what}")


_COLUMNS = (
    "run",
    "kind",
    "model",
    "weights",
    "steps",
    "loss",
    "best val. loss",
    "img/s",
    "trained",
    "state",
    "last line",
)


def _row(run: RunSummary, now: float) -> tuple[str, ...]:
    depth = "" if run.depth is None else f"d{run.depth} "
    age = _age(run, now)
    best = "-" if run.best_loss is None else f"{run.best_loss:.4g} @ {run.best_step:,}"
    return (
        run.name,
        run.kind,
        "-" if run.width is None else f"{depth}w{run.width}",
        _short(run.parameters),
        f"{run.step:,}" + ("" if run.steps is None else f"/{run.steps:,}"),
        _number(run.loss),
        best,
        "-" if run.images_per_second is None else f"{run.images_per_second:,.4g}",
        "-" if run.seconds is None else console.format_seconds(run.seconds),
        run.state,
        "-" if age is None else f"{console.format_seconds(age)} ago",
    )


def _compare(folders: list[Path], over: str, out: Path, json: bool) -> None:
    from varcli.report.compare import draw_comparison, short_names
    from varcli.report.runs import differences, final_numbers, read_runs, summarize, to_json

    found = read_runs(folders)
    settings, numbers = differences(found), final_numbers(found)
    path = draw_comparison(found, out, over)
    names = short_names(found)
    if json:
        whole = [run.name for run in found]
        value = {
            "runs": [to_json(summarize(run)) for run in found],
            "settings": {name: dict(zip(whole, values, strict=True)) for name, values in settings.items()},
            "numbers": {name: dict(zip(whole, values, strict=True)) for name, values in numbers.items()},
            "plot": str(path),
        }
        console.json_result(value)
        return
    if settings:
        rows = [(name, *map(_setting, values)) for name, values in settings.items()]
        console.table(("settings that differ", *names), rows)
    else:
        console.result("the settings of all of them are the same")
    console.result("")
    console.table(("numbers", *names), [(name, *map(_number, values)) for name, values in numbers.items()])
    console.result(f"\nlosses over {over}: {path}")


def _age(run: RunSummary, now: float) -> float | None:
    return None if run.last_write is None else round(max(0.0, now - run.last_write), 1)


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if float(value).is_integer() and abs(value) >= 10 else f"{value:.4g}"


def _short(count: int | None) -> str:
    if count is None:
        return "-"
    return f"{count / 1e6:,.3g}M" if count < 1e9 else f"{count / 1e9:.3g}G"


def _setting(value: Any) -> str:
    if value is None:
        return "-"
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return text if len(text) <= _WIDTH else text[: _WIDTH - 3] + "..."
