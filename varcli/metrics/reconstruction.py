"""How a tokenizer is evaluated, and what comes of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from varcli.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ReconstructionConfig:
    """How a tokenizer is evaluated."""

    split: str | None = None  # of an image folder; None takes its validation images, else all there are
    count: int | None = None  # images, at most; None takes all
    features: str = "auto"  # inception, lite0, or auto: Inception if its weights are at hand
    inception_weights: Path | None = None  # file; None looks in $VARCLI_INCEPTION_WEIGHTS and torch's download folder
    allow_unknown_weights: bool = False  # take Inception weights other than the published ones
    lpips_weights: Path | None = None  # folder of the two files of LPIPS; None looks among torch's downloads
    device: str = "auto"  # as in `varcli.devices.resolve_device`
    batch_size: int | None = None  # images at a time; None chooses
    workers: int | None = None  # processes that decode; None chooses

    def __post_init__(self) -> None:
        if any(value is not None and value < 1 for value in (self.count, self.batch_size)):
            raise ConfigError("count and batch_size must be at least 1")


@dataclass(frozen=True, kw_only=True)
class ScaleUse:
    """How one scale uses the codebook."""

    side: int  # of its token map
    tokens: int  # of an image
    codebook_used: float  # share of the codes that these images need at this scale
    codebook_reachable: float  # the share if all its tokens were different, below 1 for few images
    perplexity: float  # exp(entropy) of the codes, from 1 to the codebook's size


@dataclass(frozen=True, kw_only=True)
class ReconstructionResult:
    """Numbers, and what they stand for."""

    metrics: dict[str, float]  # by name; all finite
    skipped: dict[str, str]  # metrics that could not be computed, and why
    scales: tuple[ScaleUse, ...]  # coarse to fine
    num_exact: int  # images that came back without any error
    images: dict[str, Any]  # path, count, size, preparation
    measured_against: str  # the reference of the distances between sets
    tokenizer: dict[str, Any]  # path, fingerprint, scales, bits a pixel
    features: dict[str, Any]  # network, hash of its weights, preprocessing, device
    warnings: tuple[str, ...]  # what a reader must know before comparing the numbers
    versions: dict[str, str]  # of varcli and of the libraries that compute

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object: each number under its own name, the rest beside them."""
        rest = {name: value for name, value in vars(self).items() if name not in ("metrics", "scales", "warnings")}
        return {
            **self.metrics,
            **rest,
            "scales": [asdict(scale) for scale in self.scales],
            "warnings": list(self.warnings),
        }
