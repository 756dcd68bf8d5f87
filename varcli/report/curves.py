"""The curves of a training run as one PNG, drawn from its log: losses, quality, and the health of the codebook."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from varcli.data.samples import save_png
from varcli.errors import ArtifactError
from varcli.training.runlog import LOG_NAME, read_log

CURVES_NAME = "curves.png"

_FINER = 2  # drawn so many times larger, then shrunk, which smooths lines
_WIDTH, _HEIGHT, _COLUMNS = 600, 320, 2  # of a panel in pixels
_LEFT, _TOP, _RIGHT, _BOTTOM = 58, 46, 180, 30  # around the curves, the names of which stand on the right
_COLOURS = ("#3b77bc", "#d2452d", "#4d9e4a", "#8e5bb5", "#c98a12")
_COARSE, _FINE = (38, 60, 150), (236, 150, 30)  # ends of the colours of scales
_INK, _FAINT, _MARK = "#222222", "#d8d8d8", "#888888"
_SCALE = re.compile(r"(.+)_scale_(\d+)")

Points = list[tuple[int, float]]


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One chart: which numbers of the log it shows, and how."""

    title: str
    train: tuple[str, ...] = ()  # names in lines of kind "train"
    validation: tuple[str, ...] = ()  # names in lines of kind "validation"
    by_scale: str | None = None  # name of a validation number that each scale has one of
    is_log: bool = False  # values are spread by their logarithm


PANELS = (
    Panel(
        title="losses",
        train=("loss", "pixel_loss", "perceptual_loss", "quantizer_loss"),
        validation=("loss",),
        is_log=True,
    ),
    Panel(title="discriminator", train=("adversarial_loss", "discriminator_loss", "real_logit", "fake_logit")),
    Panel(title="PSNR in dB", validation=("psnr",)),
    Panel(title="accuracy", train=("accuracy",), validation=("accuracy",)),
    Panel(title="loss of each scale", by_scale="loss"),
    Panel(title="share of the codebook used", validation=("codebook_used",), by_scale="codebook_used"),
    Panel(title="perplexity: codes worth of use", validation=("perplexity",), by_scale="perplexity", is_log=True),
)
"""The charts of a run, in order; one that a run has no numbers for is left out."""


@dataclass
class _Curve:
    name: str
    colour: Any
    points: Points = field(default_factory=list)
    is_dotted: bool = False  # few points, each worth a dot


def draw_curves(run: Path, out: Path | None = None) -> Path:
    """Draw what the log of a run folder holds into one PNG, and return where it is.

    out: the file to write; None takes curves.png in the run folder. A vertical line marks the step from which the
    discriminator is heard. Raises ArtifactError if the folder has no log, or one without a line of numbers.
    """
    run = Path(run)
    if not (run / LOG_NAME).is_file():
        raise ArtifactError(f"`{run}` holds no {LOG_NAME}", "give the folder of a run of train or train-tokenizer")
    image = plot_records(read_log(run))
    if image is None:
        raise ArtifactError(f"`{run / LOG_NAME}` holds no numbers yet", "train for some steps more")
    path = out or run / CURVES_NAME
    save_png(path, image)
    return path


def plot_records(records: Sequence[Mapping[str, Any]]) -> Image.Image | None:
    """Draw the panels that lines of a log, as `read_log` returns them, have numbers for; None if there are none."""
    panels = [(panel, curves) for panel in PANELS if (curves := _curves(panel, records))]
    if not panels:
        return None
    steps = [step for _, curves in panels for curve in curves for step, _ in curve.points]
    start = discriminator_start(records)
    rows = -(-len(panels) // _COLUMNS)
    size = (_COLUMNS * _WIDTH, rows * _HEIGHT)
    image = Image.new("RGB", (size[0] * _FINER, size[1] * _FINER), "white")
    for number, (panel, curves) in enumerate(panels):
        row, column = divmod(number, _COLUMNS)
        _draw_panel(image, (column * _WIDTH, row * _HEIGHT), panel, curves, (min(steps), max(steps)), start)
    return image.resize(size, Image.Resampling.LANCZOS)


def discriminator_start(records: Iterable[Mapping[str, Any]]) -> int | None:
    """Return the last step logged before the discriminator was heard, None if it never was."""
    before = 0
    for record in records:
        if record.get("kind") == "train":
            if "adversarial_loss" in record:
                return before
            before = int(record["step"])
    return None


def _curves(panel: Panel, records: Sequence[Mapping[str, Any]]) -> list[_Curve]:
    curves = [_Curve(name.replace("_", " "), None, _points(records, "train", name)) for name in panel.train]
    curves += [
        _Curve(_shown(panel, name), None, _points(records, "validation", name), True) for name in panel.validation
    ]
    for number, curve in enumerate(curves):
        curve.colour = _COLOURS[number % len(_COLOURS)]
    if panel.by_scale is not None:
        curves += _scale_curves(panel.by_scale, records)
    if panel.is_log:
        for curve in curves:
            curve.points = [(step, value) for step, value in curve.points if value > 0]
    return [curve for curve in curves if curve.points]


def _shown(panel: Panel, name: str) -> str:
    return "all scales" if name == panel.by_scale else f"validation {name}".replace("_", " ")


def _scale_curves(name: str, records: Sequence[Mapping[str, Any]]) -> list[_Curve]:
    scales = {
        int(match[2])
        for record in records
        if record.get("kind") == "validation"
        for key in _flat(record)
        if (match := _SCALE.fullmatch(key)) and match[1] == name
    }
    curves = []
    for scale in sorted(scales):
        share = scale / (max(scales) or 1)
        colour = tuple(round(a + (b - a) * share) for a, b in zip(_COARSE, _FINE, strict=True))
        curves.append(_Curve(f"scale {scale}", colour, _points(records, "validation", f"{name}_scale_{scale}")))
    return curves


def _points(records: Iterable[Mapping[str, Any]], kind: str, name: str) -> Points:
    """The finite values of one number; what was no number is text in the log."""
    found = ((record["step"], _flat(record).get(name)) for record in records if record.get("kind") == kind)
    return [
        (int(step), float(value))
        for step, value in found
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    ]


def _flat(record: Mapping[str, Any]) -> dict[str, Any]:
    """A log line with a list such as loss_by_scale as loss_scale_0, loss_scale_1, ..."""
    flat = dict(record)
    for key, value in record.items():
        if isinstance(value, list):
            stem = key.removesuffix("_by_scale")
            flat |= {f"{stem}_scale_{number}": entry for number, entry in enumerate(value)}
    return flat


def _draw_panel(
    image: Image.Image,
    corner: tuple[int, int],
    panel: Panel,
    curves: Sequence[_Curve],
    steps: tuple[int, int],
    start: int | None,
) -> None:
    """Draw one chart with its upper left corner at `corner`, in pixels of the finished picture."""
    draw = ImageDraw.Draw(image)
    bold, small = (ImageFont.load_default(size * _FINER) for size in (15, 12))
    left, top = corner[0] + _LEFT, corner[1] + _TOP
    right, bottom = corner[0] + _WIDTH - _RIGHT, corner[1] + _HEIGHT - _BOTTOM
    values = [value for curve in curves for _, value in curve.points]
    ticks = log_ticks(min(values), max(values)) if panel.is_log else ticks_of(min(values), max(values))
    scale: Callable[[float], float] = math.log10 if panel.is_log else float
    low, high = scale(min(ticks[0], min(values))), scale(max(ticks[-1], max(values)))

    def at(step: float, value: float) -> tuple[float, float]:
        across = (step - steps[0]) / ((steps[1] - steps[0]) or 1)
        up = (scale(value) - low) / ((high - low) or 1)
        return (left + across * (right - left)) * _FINER, (bottom - up * (bottom - top)) * _FINER

    def write(x: float, y: float, text: str, anchor: str, font: Any = small, fill: Any = _INK) -> None:
        draw.text((x * _FINER, y * _FINER), text, fill=fill, font=font, anchor=anchor)

    write(left, corner[1] + 10, panel.title, "lt", bold)
    for tick in ticks:
        y = at(steps[0], tick)[1]
        draw.line([(left * _FINER, y), (right * _FINER, y)], fill=_FAINT, width=_FINER)
        write(left - 6, y / _FINER, f"{tick:g}", "rm")
    for tick in ticks_of(*steps):
        if steps[0] <= tick <= steps[1]:
            write(at(tick, values[0])[0] / _FINER, bottom + 7, f"{tick:,.0f}", "mt")
    if start is not None and steps[0] <= start <= steps[1]:
        x = at(start, values[0])[0]
        draw.line([(x, top * _FINER), (x, bottom * _FINER)], fill=_MARK, width=_FINER)
        write(x / _FINER - 3, top - 2, "discriminator", "rb", fill=_MARK)
    line = min(15.0, (bottom - top) / len(curves))
    for number, curve in enumerate(curves):
        places = [at(*point) for point in curve.points]
        if len(places) > 1:
            draw.line(places, fill=curve.colour, width=2 * _FINER, joint="curve")
        if curve.is_dotted or len(places) == 1:
            for x, y in places:
                radius = 2.5 * _FINER
                draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=curve.colour)
        y = top + (number + 0.5) * line
        write(right + 8, y, f"{curve.name} {curve.points[-1][1]:.3g}", "lm", fill=curve.colour)


def ticks_of(low: float, high: float, count: int = 5) -> list[float]:
    """Return about `count` round numbers that reach from `low` or below to `high` or above."""
    reach = (high - low) or abs(high) or 1.0
    power = 10 ** math.floor(math.log10(reach / count))
    width = next(power * factor for factor in (1, 2, 5, 10) if power * factor * count >= reach * 0.999)
    first, last = math.floor(low / width + 1e-9), math.ceil(high / width - 1e-9)
    return [round(number * width, 12) for number in range(first, max(last, first + 1) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Return numbers such as 0.1, 0.2, 0.5, 1 that reach from `low` or below to `high` or above, at most ten; low > 0."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 2, 5), (1, 3), (1,)):
        ticks = [float(f"{factor}e{power}") for power in powers for factor in factors]
        below = max(tick for tick in ticks if tick <= low * 1.000001)
        above = min((tick for tick in ticks if tick >= high * 0.999999), default=ticks[-1])
        ticks = [tick for tick in ticks if below <= tick <= above]
        if len(ticks) <= 10:
            break
    return ticks[:: -(-len(ticks) // 10)]
