"""Whether this evaluator gives the numbers of the original one, on the sample files that its authors published."""

from __future__ import annotations

from dataclasses import dataclass

from varcli.errors import ConfigError, DataError
from varcli.metrics.inception import WEIGHTS_SHA256
from varcli.metrics.result import EvalResult

# the TensorFlow evaluator's, as the README of lavinal712/ADM-evaluation-suite-pytorch reports them, by side in pixels
_TENSORFLOW = {
    256: ("admnet_guided_upsampled_imagenet256.npz", (3.94256, 6.14043, 215.837, 0.8265, 0.5309)),
    128: ("admnet_guided_imagenet128.npz", (2.97329, 5.09456, 141.4767, 0.78138, 0.5929)),
}
_NAMES = ("fid", "sfid", "inception_score", "precision", "recall")
# on real files; the original's precision and recall carry the rounding of its float16 distances, upward
_ALLOWED = (0.005, 0.005, 0.2, 0.002, 0.004)
_COUNT = 50_000


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One number, here and there."""

    name: str
    original: float  # of the TensorFlow evaluator
    here: float
    allowed: float  # largest difference that other hardware and float16 explain

    @property
    def agrees(self) -> bool:
        """Whether the difference is within what is allowed."""
        return abs(self.here - self.original) <= self.allowed


def compare_with_original(result: EvalResult) -> tuple[Comparison, ...]:
    """Set a result on one of the published sample files beside the TensorFlow evaluator's numbers.

    Raises ConfigError if the features are not those of the published Inception weights, DataError if the samples or the
    reference cannot be the published ones, or a metric is missing.
    """
    if result.features["weights_sha256"] != WEIGHTS_SHA256:
        raise ConfigError("the self-test needs the published Inception weights", "pass them with --inception-weights")
    side, count = result.samples.get("width"), result.samples.get("count")
    files = " or ".join(file for file, _ in _TENSORFLOW.values())
    if side not in _TENSORFLOW or count != _COUNT:
        raise DataError(
            f"the self-test reads a published file of {_COUNT:,} samples, but `{result.samples['path']}` has {count} of "
            f"{side} px",
            f"pass {files}, as the ADM evaluation suite has them",
        )
    for name in _NAMES:
        if name not in result.metrics:
            reason = result.skipped.get(name, "it was not asked for")
            raise DataError(f"the self-test needs `{name}`: {reason}", "pass the whole reference file of that size")
    return tuple(
        Comparison(name=name, original=original, here=result.metrics[name], allowed=allowed)
        for name, original, allowed in zip(_NAMES, _TENSORFLOW[side][1], _ALLOWED, strict=True)
    )
