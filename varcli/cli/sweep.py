"""`varcli sweep`: sampling settings tried and measured."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Option

from varcli.cli import console
from varcli.cli.options import (
    BatchSizeOption,
    CacheOption,
    DeviceOption,
    FeaturesOption,
    InceptionWeightsOption,
    JsonOption,
    KeepOption,
    ModelOption,
    OutOption,
    PrecisionOption,
    SeedOption,
)
from varcli.errors import ConfigError

if TYPE_CHECKING:
    from varcli.progress import OnStep


def sweep(
    cfg: Annotated[str, Option("--cfg", help="Guidance strengths, comma-separated.")] = "1.0,1.5,2.0",
    top_k: Annotated[str, Option("--top-k", help="Numbers of likeliest codes, comma-separated; 0 is all.")] = "900",
    top_p: Annotated[str, Option("--top-p", help="Probabilities kept, comma-separated; 1 is all.")] = "0.96",
    per_class: Annotated[int, Option("--per-class", min=1, help="Images of each class.")] = 50,
    out: OutOption = Path("sweep"),
    model: ModelOption = None,
    ref: Annotated[
        str | None, Option("--ref", help="As in varcli eval; default: what the samples name.", show_default=False)
    ] = None,
    cfg_schedule: Annotated[
        str, Option("--cfg-schedule", help="linear, cosine or constant over the scales.")
    ] = "linear",
    features: FeaturesOption = "auto",
    inception_weights: InceptionWeightsOption = None,
    cache: CacheOption = None,
    keep: KeepOption = True,
    seed: SeedOption = 0,
    batch_size: BatchSizeOption = None,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
    json: JsonOption = False,
) -> None:
    """Draw samples with each combination of settings, measure them, and draw distance against score."""
    from varcli.metrics.feature_cache import default_cache
    from varcli.metrics.result import EvalConfig
    from varcli.report.sweep import SweepConfig
    from varcli.report.sweep import sweep as run
    from varcli.sampling import SampleConfig

    config = SweepConfig(
        cfg=_numbers("--cfg", cfg, float),
        top_k=_numbers("--top-k", top_k, int),
        top_p=_numbers("--top-p", top_p, float),
        per_class=per_class,
        sampling=SampleConfig(seed=seed, cfg_schedule=cfg_schedule, precision=precision),
        batch_size=batch_size,
        device=device,
    )
    evaluation = EvalConfig(
        reference=ref,
        features=features,
        inception_weights=inception_weights,
        device=device,
        cache=(cache or default_cache()) if keep else None,
        floor=False,
    )
    result = run(model, out, config, evaluation, _announce)
    if json:
        value = {
            "folder": str(result.folder),
            "best": result.best,
            "metrics": result.metrics,
            "chart": str(result.chart),
        }
        console.json_result(value)
        return
    names = list(next(iter(result.metrics.values())))
    rows = [(name, *(f"{values[key]:.4g}" for key in names)) for name, values in result.metrics.items()]
    console.table(("settings", *names), rows)
    console.result(f"best: {result.best}; chart: {result.chart}")
    for warning in result.warnings:
        console.note(f"warning: {warning}")


def _announce(name: str, number: int, count: int) -> OnStep:
    console.note(f"{number} of {count}: {name}")
    return console.progress("  ")


def _numbers(option: str, text: str, kind: type) -> tuple:
    try:
        return tuple(kind(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise ConfigError(
            f"`{option}` takes numbers with commas between them, but got `{text}`", "e.g. 1.0,1.5"
        ) from None
