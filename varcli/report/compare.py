"""Several runs in one picture: their losses over steps, hours or images, and the quality that goes with them."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

from varcli.data.png import save_png
from varcli.data.runs import RunRecord, is_number, numbers_of
from varcli.errors import ArtifactError, ConfigError, unknown_name
from varcli.report.plots import COLOURS, DASHES, MARKERS, Chart, Curve, Points, draw_charts, is_wide

AXES = {"steps": "optimizer steps", "hours": "hours of training", "images": "images seen"}
"""What the losses may be drawn over, by the name of the option, and what it is called in the picture."""

MAX_RUNS = len(COLOURS) * len(DASHES)
"""Runs that can be told apart in one picture."""

_SMOOTH = 0.02  # half the width of the smoothing window, as a share of the axis
_START = 0.05  # share of the axis whose losses, high and falling, do not decide how far up the picture reaches
_SIZE, _LEGEND = (1180, 420), 280  # pixels of a chart, and of its right side that names the runs
_QUALITY = (("psnr", "PSNR in dB"), ("accuracy", "accuracy: share of codes guessed right"))


def draw_comparison(runs: Sequence[RunRecord], out: Path, over: str = "steps") -> Path:
    """Draw the losses of runs into one PNG at `out`, and return where it is.

    over: "steps", "hours" of training, or "images" seen. Training losses are smoothed, with what they were behind;
    validation losses are points. Raises ConfigError for another `over` or more than MAX_RUNS runs, ArtifactError if no
    run has a loss yet.
    """
    if over not in AXES:
        raise unknown_name("axis", over, AXES)
    if len(runs) > MAX_RUNS:
        raise ConfigError(f"{len(runs)} runs in one picture cannot be told apart", f"name at most {MAX_RUNS}")
    names = short_names(runs)
    charts = [_loss_chart(runs, names, over)]
    if not charts[0].curves:
        raise ArtifactError("none of these runs has a loss in its log yet", "train for some steps more")
    for number, title in _QUALITY:
        curves = [_quality(run, names, place, over, number) for place, run in enumerate(runs)]
        if curves := [curve for curve in curves if curve.line]:
            charts.append(Chart(title=f"validation {title}", curves=curves, x_name=AXES[over]))
    ends = [x for chart in charts for curve in chart.curves for x, _ in (*curve.line, *curve.dots)]
    charts = [replace(chart, x_range=(min(ends), max(ends))) for chart in charts]
    save_png(out, draw_charts(charts, _SIZE, columns=1, legend=_LEGEND))
    return out


def short_names(runs: Sequence[RunRecord]) -> list[str]:
    """Names of runs without the folders that they all are in."""
    parts = [run.name.split("/") for run in runs]
    shared = 0
    while all(len(name) > shared + 1 for name in parts) and len({name[shared] for name in parts}) == 1:
        shared += 1
    return ["/".join(name[shared:]) for name in parts]


def smooth(points: Points, half_width: float) -> list[tuple[float, float]]:
    """Return a mean around each point that weighs near points more, over at most `half_width` to either side.

    The window shrinks towards the first point, so that a steep start is not flattened; at the end it has one side only.
    """
    return _running_mean(_running_mean(points, half_width / 2), half_width / 2)  # two flat windows make a triangle


def _running_mean(points: Points, half_width: float) -> list[tuple[float, float]]:
    xs = [x for x, _ in points]
    sums = [0.0, *accumulate(value for _, value in points)]
    means = []
    for x, _ in points:
        reach = min(half_width, x - xs[0])
        first, last = bisect_left(xs, x - reach), bisect_right(xs, x + reach)
        means.append((x, (sums[last] - sums[first]) / (last - first)))
    return means


def _loss_chart(runs: Sequence[RunRecord], names: Sequence[str], over: str) -> Chart:
    losses = [_along(run, run.lines("train"), "loss", over) for run in runs]
    ends = [x for points in losses for x, _ in points]
    width = _SMOOTH * (max(ends) - min(ends)) if ends else 0.0
    curves = []
    for place, (run, points) in enumerate(zip(runs, losses, strict=True)):
        validation = _along(run, run.lines("validation"), "loss", over)
        if points or validation:
            line = smooth(points, width)
            curves.append(
                Curve(name=names[place], note=_note(run), line=line, raw=points, dots=validation, **_look(place))
            )
    values = list(_telling(curves))
    return Chart(
        title="loss",
        remark="lines: training, smoothed, as logged behind; points: validation",
        curves=curves,
        x_name=AXES[over],
        y_range=(min(values), max(values)) if values else None,
        is_log=min(values, default=0.0) > 0 and is_wide(values),
    )


def _telling(curves: Sequence[Curve]) -> Iterator[float]:
    """The values that the picture must hold: all but those of the first few steps."""
    ends = [x for curve in curves for x, _ in (*curve.line, *curve.dots)]
    start = min(ends, default=0.0) + _START * (max(ends, default=0.0) - min(ends, default=0.0))
    for curve in curves:
        points = (*curve.line, *curve.dots)
        yield from [value for x, value in points if x >= start] or [value for _, value in points]


def _quality(run: RunRecord, names: Sequence[str], place: int, over: str, number: str) -> Curve:
    points = _along(run, run.lines("validation"), number, over)
    note = f"{points[-1][1]:.4g} at last" if points else ""
    return Curve(name=names[place], note=note, line=points, dots=points, **_look(place))


def _look(place: int) -> dict[str, Any]:
    """Colour, dashes and marker of the run at a place in the list."""
    return {
        "colour": COLOURS[place % len(COLOURS)],
        "dash": DASHES[place // len(COLOURS) % len(DASHES)],
        "marker": MARKERS[place % len(MARKERS)],
    }


def _note(run: RunRecord) -> str:
    step, loss = min(numbers_of(run.lines("validation"), "loss"), key=lambda pair: pair[1], default=(0, None))
    return f"best {loss:.4g} at step {step:,}" if loss is not None else "never validated"


def _along(run: RunRecord, records: Sequence[dict[str, Any]], name: str, over: str) -> list[tuple[float, float]]:
    """The values of a number over the axis; x rises. Lines whose place on it is not known are left out."""
    points = numbers_of(records, name)
    if over == "hours":
        clock = [(step, seconds / 3600) for step, seconds in numbers_of(run.lines("train"), "seconds")]
        return [(hours, value) for step, value in points if (hours := _hours_at(step, clock)) is not None]
    batch = run.config.get("batch_size") if over == "images" else 1
    return [(step * batch, value) for step, value in points] if is_number(batch) else []


def _hours_at(step: int, clock: Sequence[tuple[int, float]]) -> float | None:
    """When a step was done; validations come after a training line of the same step."""
    place = bisect_right(clock, (step, float("inf")))
    return clock[place - 1][1] if place else None
