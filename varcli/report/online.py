"""Evaluation while training: a few samples of the weights there are, measured as `varcli eval` measures them."""

from __future__ import annotations

from pathlib import Path

from varcli.metrics.evaluate import evaluate
from varcli.metrics.feature_cache import default_cache
from varcli.metrics.reference import default_reference
from varcli.metrics.result import EvalConfig
from varcli.sampling import Generator
from varcli.training.transformer_trainer import SampleRequest


def evaluate_request(request: SampleRequest, count: int, cache: Path | None = None) -> dict[str, float]:
    """Draw `count` images, the classes in turn and the same seeds each time, and return their metrics by name.

    They are measured against the images that the model learns from. cache: see `EvalConfig`; None takes the usual one.
    With few images the numbers compare along a run, not with papers. Raises what `evaluate` raises.
    """
    generator = Generator(request.tokenizer, request.transformer, request.classes)
    num_classes = len(request.classes)
    images = generator.sample([number % num_classes for number in range(count)])
    info = {"reference": request.source, "classes": list(request.classes)}
    config = EvalConfig(
        reference=default_reference(info, (images.shape[2], images.shape[3])),
        device=str(generator.device),
        cache=cache or default_cache(),
        floor=False,
    )
    return dict(evaluate(images, config).metrics)
