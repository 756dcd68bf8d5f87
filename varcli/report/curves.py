"""The curves of a training run as one PNG, drawn from its log: losses, quality, and the health of the codebook."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from varcli.artifacts.verify import read_json, read_manifest
from varcli.data.png import save_png
from varcli.data.runs import CONFIG_NAME, LOG_NAME, numbers_of, read_log
from varcli.errors import ArtifactError
from varcli.report.plots import COLOURS, Chart, Curve, draw_charts, is_wide

CURVES_NAME = "curves.png"

_COARSE, _FINE = (38, 60, 150), (236, 150, 30)  # ends of the colours of scales
_SCALE = re.compile(r"(.+)_scale_(\d+)")


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One chart: which numbers of the log it shows, and how."""

    title: str
    train: tuple[str, ...] = ()  # names in lines of kind "train"
    validation: tuple[str, ...] = ()  # names in lines of kind "validation"
    by_scale: str | None = None  # name of a validation number that each scale has one of
    may_be_log: bool = False  # values are spread by their logarithm where they reach far


PANELS = (
    Panel(
        title="losses",
        train=("loss", "pixel_loss", "perceptual_loss", "quantizer_loss"),
        validation=("loss",),
        may_be_log=True,
    ),
    Panel(title="discriminator", train=("adversarial_loss", "discriminator_loss", "real_logit", "fake_logit")),
    Panel(title="PSNR in dB", validation=("psnr",)),
    Panel(title="accuracy", train=("accuracy",), validation=("accuracy",)),
    Panel(title="loss of each scale", by_scale="loss"),
    Panel(title="share of the codebook used", validation=("codebook_used",), by_scale="codebook_used"),
    Panel(title="perplexity: codes worth of use", validation=("perplexity",), by_scale="perplexity", may_be_log=True),
)
"""The charts of a run, in order; one that a run has no numbers for is left out."""


def draw_curves(run: Path, out: Path | None = None) -> Path:
    """Draw what the log of a run folder holds into one PNG, and return where it is.

    out: the file to write; None takes curves.png in the run folder. A vertical line marks the step from which the
    discriminator is heard. Raises ArtifactError if the folder has no log, or one without a line of numbers.
    """
    run = Path(run)
    if not (run / LOG_NAME).is_file():
        raise ArtifactError(f"`{run}` holds no {LOG_NAME}", "give the folder of a run of train or train-tokenizer")
    image = plot_records(read_log(run), _sides_of(run))
    if image is None:
        raise ArtifactError(f"`{run / LOG_NAME}` holds no numbers yet", "train for some steps more")
    path = out or run / CURVES_NAME
    save_png(path, image)
    return path


def plot_records(records: Sequence[Mapping[str, Any]], sides: Sequence[int] = ()) -> Image.Image | None:
    """Draw the panels that lines of a log, as `read_log` returns them, have numbers for; None if there are none.

    sides: of the scales, which name them; without them they are numbered.
    """
    panels = [(panel, curves) for panel in PANELS if (curves := _curves(panel, records, sides))]
    if not panels:
        return None
    steps = [step for _, curves in panels for curve in curves for step, _ in (*curve.line, *curve.dots)]
    start = discriminator_start(records)
    charts = [
        Chart(
            title=panel.title,
            curves=curves,
            x_name="steps",
            x_range=(min(steps), max(steps)),
            is_log=panel.may_be_log and is_wide([value for curve in curves for _, value in (*curve.line, *curve.dots)]),
            marks=() if start is None else ((start, "discriminator"),),
        )
        for panel, curves in panels
    ]
    return draw_charts(charts)


def discriminator_start(records: Iterable[Mapping[str, Any]]) -> int | None:
    """Return the last step logged before the discriminator was heard, None if it never was."""
    before = 0
    for record in records:
        if record.get("kind") == "train":
            if "adversarial_loss" in record:
                return before
            before = int(record["step"])
    return None


def _sides_of(run: Path) -> Sequence[int]:
    """Sides of the scales of a run, from its config or the tokenizer in it; nothing if neither tells."""
    tokenizer = None
    with contextlib.suppress(ArtifactError):  # names are not worth a picture
        stored = read_json(run / CONFIG_NAME)
        config = stored.get("config") if isinstance(stored, dict) else None
        tokenizer = config.get("tokenizer") if isinstance(config, dict) else None
    with contextlib.suppress(ArtifactError):
        tokenizer = tokenizer or read_manifest(run / "tokenizer").info.get("config")
    sides = tokenizer.get("patch_nums") if isinstance(tokenizer, dict) else None
    return sides if isinstance(sides, list) else ()


def _curves(panel: Panel, records: Sequence[Mapping[str, Any]], sides: Sequence[int]) -> list[Curve]:
    named = [("train", name, name.replace("_", " ")) for name in panel.train]
    named += [("validation", name, _shown(panel, name)) for name in panel.validation]
    curves = [
        _curve(shown, COLOURS[number % len(COLOURS)], records, kind, name, has_dots=kind == "validation")
        for number, (kind, name, shown) in enumerate(named)
    ]
    if panel.by_scale is not None:
        curves += _scale_curves(panel.by_scale, records, sides)
    return [curve for curve in curves if curve.line]


def _curve(
    shown: str,
    colour: tuple[int, int, int],
    records: Sequence[Mapping[str, Any]],
    kind: str,
    name: str,
    has_dots: bool = False,
) -> Curve:
    points = numbers_of((_flat(record) for record in records if record.get("kind") == kind), name)
    note = f"{points[-1][1]:.3g}" if points else ""
    return Curve(name=shown, colour=colour, line=points, dots=points if has_dots else (), note=note)


def _shown(panel: Panel, name: str) -> str:
    return "all scales" if name == panel.by_scale else f"validation {name}".replace("_", " ")


def _scale_curves(name: str, records: Sequence[Mapping[str, Any]], sides: Sequence[int]) -> list[Curve]:
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
        red, green, blue = (round(a + (b - a) * share) for a, b in zip(_COARSE, _FINE, strict=True))
        shown = f"{sides[scale]} x {sides[scale]}" if max(scales) < len(sides) else f"scale {scale}"
        curves.append(_curve(shown, (red, green, blue), records, "validation", f"{name}_scale_{scale}"))
    return curves


def _flat(record: Mapping[str, Any]) -> dict[str, Any]:
    """A log line with a list such as loss_by_scale as loss_scale_0, loss_scale_1, ..."""
    flat = dict(record)
    for key, value in record.items():
        if isinstance(value, list):
            stem = key.removesuffix("_by_scale")
            flat |= {f"{stem}_scale_{number}": entry for number, entry in enumerate(value)}
    return flat
