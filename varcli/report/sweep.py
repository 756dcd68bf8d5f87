"""A sweep over sampling settings: samples and their measures for each, and how quality trades against variety."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from varcli import config as configs
from varcli.artifacts.lock import hold_folder
from varcli.artifacts.verify import read_json
from varcli.artifacts.write import write_json, write_text
from varcli.errors import ConfigError
from varcli.metrics.evaluate import evaluate
from varcli.metrics.result import EvalConfig
from varcli.progress import OnStep, ignore
from varcli.report.charts import Dot, scatter
from varcli.sampling import Generator, SampleConfig
from varcli.sampling.models import find_model
from varcli.sampling.write import sample_to_folder

RESULTS_NAME, CHART_NAME = "sweep.json", "sweep.svg"


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """Which settings are tried; every value with every other."""

    cfg: tuple[float, ...] = (1.0, 1.5, 2.0)  # guidance, as in `SampleConfig`
    top_k: tuple[int, ...] = (900,)  # 0 draws from all codes
    top_p: tuple[float, ...] = (0.96,)  # 1 draws from all codes
    per_class: int = 50  # images of each class
    sampling: SampleConfig = field(default_factory=SampleConfig)  # what all have in common
    batch_size: int | None = None  # images drawn at a time; None chooses
    device: str = "auto"  # to draw on, as in `varcli.devices.resolve_device`

    def __post_init__(self) -> None:
        if not (self.cfg and self.top_k and self.top_p) or self.per_class < 1:
            raise ConfigError("a sweep needs at least one cfg, top_k and top_p, and one image a class")

    def points(self) -> dict[str, SampleConfig]:
        """Every combination by the name of its folder. Raises ConfigError for values that sampling refuses."""
        return {
            f"cfg{cfg:g}-k{top_k}-p{top_p:g}": replace(self.sampling, cfg=cfg, top_k=top_k or None, top_p=top_p)
            for cfg, top_k, top_p in itertools.product(self.cfg, self.top_k, self.top_p)
        }


@dataclass(frozen=True, kw_only=True)
class SweepResult:
    """What each combination came to."""

    folder: Path
    metrics: dict[str, dict[str, float]]  # combination -> metric -> number
    settings: dict[str, dict[str, Any]]  # combination -> cfg, top_k, top_p
    best: str  # the combination of the smallest distance
    chart: Path
    warnings: tuple[str, ...]


OnPoint = Callable[[str, int, int], OnStep]
"""Told name, number (from 1) and count of a combination before it begins; what it returns hears how far it is."""


def sweep(
    model: str | Path | None,
    out: Path,
    config: SweepConfig | None = None,
    evaluation: EvalConfig | None = None,
    on_point: OnPoint = lambda name, number, count: ignore,
) -> SweepResult:
    """Draw `per_class` images of every class with each combination of settings, measure them, and compare.

    model: as in `find_model`. A rerun goes on: samples that are there are not drawn again, measured ones not measured
    again. Raises what sampling and evaluation raise, ConfigError if `out` holds a sweep of another model or reference.
    """
    config, evaluation, out = config or SweepConfig(), evaluation or EvalConfig(), Path(out)
    points = config.points()
    found = find_model(model)
    generator = Generator.load(found.folder, config.device)
    wanted = [(number, index) for number in range(len(generator.classes)) for index in range(config.per_class)]
    common = {
        "model": generator.weights_sha256,
        "per_class": config.per_class,
        "sampling": {key: value for key, value in configs.to_dict(config.sampling).items() if key not in _VARIED},
        "reference": evaluation.reference,
        "features": evaluation.features,
    }
    with hold_folder(out, {RESULTS_NAME}, "sweep"):
        stored = _read(out, common)
        warnings: tuple[str, ...] = tuple(stored.get("warnings", ()))
        metrics: dict[str, dict[str, float]] = stored.get("metrics", {})
        write_json(out / RESULTS_NAME, {**common, "metrics": metrics, "warnings": list(warnings)})
        for number, (name, sampling) in enumerate(points.items(), start=1):
            on_step = on_point(name, number, len(points))
            if name in metrics:
                continue
            sample_to_folder(
                generator,
                wanted,
                out / name,
                sampling,
                model=found.folder.name,
                batch_size=config.batch_size,
                on_step=on_step,
            )
            result = evaluate(out / name, evaluation, on_step)
            metrics[name], warnings = result.metrics, result.warnings
            write_json(out / RESULTS_NAME, {**common, "metrics": metrics, "warnings": list(warnings)})
        mine = {name: metrics[name] for name in points}
        distance, score = _axes(next(iter(mine.values())))
        best = min(mine, key=lambda name: mine[name][distance])
        dots = [
            Dot(x=values[distance], y=values[score], name=name, is_marked=name == best)
            for name, values in mine.items()
            if score is not None
        ]
        write_text(out / CHART_NAME, scatter(dots, distance, str(score)) if dots else "")
    return SweepResult(
        folder=out,
        metrics=mine,
        settings={name: {key: getattr(points[name], key) for key in _VARIED} for name in points},
        best=best,
        chart=out / CHART_NAME,
        warnings=warnings,
    )


_VARIED = ("cfg", "top_k", "top_p")


def _read(out: Path, common: dict[str, Any]) -> dict[str, Any]:
    """Return what an earlier call of this sweep found. Raises ConfigError if it was another sweep."""
    if not (out / RESULTS_NAME).is_file():
        return {}
    stored = read_json(out / RESULTS_NAME)
    changed = [key for key, value in common.items() if not isinstance(stored, dict) or stored.get(key) != value]
    if changed:
        raise ConfigError(f"`{out}` holds a sweep with another {', '.join(changed)}", "choose another --out")
    return stored


def _axes(metrics: dict[str, float]) -> tuple[str, str | None]:
    """Return the names of the distance to be small and of the score to be large, if there is one."""
    distances = [name for name in metrics if name.startswith(("fid", "fd_"))] or [
        name for name in metrics if name.startswith("kid")
    ]
    if not distances:
        raise ConfigError("a sweep needs a distance among its metrics", "e.g. --metrics fid,inception_score")
    return distances[0], next((name for name in metrics if name.startswith(("inception_score", "is_"))), None)
