"""How samples are evaluated, and what comes of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from varcli.metrics.published import Published


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """How samples are evaluated."""

    reference: str | None = None  # folder, npz file or "emoji64"; None takes what the samples' manifest names
    metrics: tuple[str, ...] | None = None  # names of METRICS, or as they appear in results; None takes the usual ones
    features: str = "auto"  # inception, lite0, or auto: Inception if its weights are at hand
    inception_weights: Path | None = None  # file; None looks in $VARCLI_INCEPTION_WEIGHTS and torch's download folder
    allow_unknown_weights: bool = False  # take Inception weights other than the published ones
    device: str = "auto"  # as in `varcli.devices.resolve_device`
    batch_size: int | None = None  # images at a time; None chooses
    workers: int | None = None  # processes that decode; None chooses
    cache: Path | None = None  # folder that keeps features of 256 images or more; None keeps none
    floor: bool = True  # also measure real images in the samples' place
    neighbours: int = 0  # samples to find the nearest real images of, for a report


@dataclass(frozen=True, kw_only=True)
class Neighbours:
    """A sample and the real images nearest to it in the features."""

    sample: np.ndarray  # uint8 (3, H, W)
    nearest: tuple[np.ndarray, ...]  # likewise, the nearest first
    distances: tuple[float, ...]  # Euclidean, between features


@dataclass(frozen=True, kw_only=True)
class EvalResult:
    """Numbers, and what they stand for."""

    metrics: dict[str, float]  # by name, in the order asked for
    skipped: dict[str, str]  # metrics that could not be computed, and why
    floor: dict[str, float]  # the same metrics of real images in the samples' place; empty if there are none
    floor_images: str | None  # which real images those are
    samples: dict[str, Any]  # path, count, size, order, preparation
    reference: dict[str, Any] | None  # likewise, or None if no metric needs one
    features: dict[str, Any]  # network, hash of its weights, preprocessing, device
    warnings: tuple[str, ...]  # what a reader must know before comparing the numbers
    versions: dict[str, str]  # of varcli and of the libraries that compute
    published: tuple[Published, ...] = ()  # rows of papers, where the protocol is theirs
    neighbours: tuple[Neighbours, ...] = ()  # of a few samples, where they were asked for
    class_counts: dict[str, int] = field(default_factory=dict)  # samples of each class, where the classes are known

    @property
    def marks(self) -> dict[str, str]:
        """What goes behind the name of these samples, and why: "-re" after rejection sampling, "-fp8" for products in FP8."""
        settings, marks = self.samples.get("settings", {}), {}
        if settings.get("reject"):  # K/N, of the candidates that a classifier liked best
            marks["-re"] = f"{settings['reject']} of the candidates kept"
        if settings.get("fp8"):
            marks["-fp8"] = "drawn with products in FP8"
        return marks

    @property
    def mark(self) -> str:
        """All `marks` in a row."""
        return "".join(self.marks)

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object: each number under its own name, the rest beside them; no pictures."""
        return {
            **self.metrics,
            "floor": {"images": self.floor_images, **self.floor} if self.floor else None,
            "skipped": self.skipped,
            "samples": self.samples,
            "reference": self.reference,
            "features": self.features,
            "warnings": list(self.warnings),
            "class_counts": self.class_counts,
            "published": [asdict(row) for row in self.published],
            "versions": self.versions,
        }
