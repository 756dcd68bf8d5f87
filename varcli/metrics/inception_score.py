"""Inception Score: sharp predictions image by image, varied ones over all (arXiv:1606.03498, Sec. 4)."""

from __future__ import annotations

import math

import numpy as np
import torch

from varcli.errors import ConfigError
from varcli.metrics.arrays import Rows, check_rows
from varcli.metrics.base import LOGITS, FeatureSet, Metric


def inception_score(logits: Rows, split_size: int = 5000, order: np.ndarray | None = None) -> float:
    """Mean over consecutive splits of exp(mean KL(p(class | image) || p(class in the split))).

    logits: (N, classes) in the order that defines the splits; Inception's are taken without bias, all 1008 of them.
    order: permutation of the N rows to read them in instead. A
    shorter last split counts as much as the others, as in the evaluator of arXiv:2105.05233. The order matters: images
    sorted by class give splits of few classes and a far lower score. Raises ShapeError for other shapes or NaN.
    """
    check_rows("logits", logits)
    if split_size < 1:
        raise ConfigError(f"split_size must be at least 1, but is {split_size}")
    scores = []
    for start in range(0, len(logits), split_size):
        rows = slice(start, start + split_size)
        split = torch.as_tensor(logits[rows if order is None else order[rows]]).cpu().double()
        log_p = split.log_softmax(dim=1)
        log_marginal = log_p.logsumexp(dim=0) - math.log(len(split))
        scores.append(float((log_p.exp() * (log_p - log_marginal)).sum(dim=1).mean().exp()))
    return sum(scores) / len(scores)


def _score(samples: FeatureSet, reference: FeatureSet, device: torch.device) -> tuple[float]:
    return (inception_score(samples.logits, order=samples.logits_order),)


INCEPTION_SCORE = Metric(
    keys=("inception_score",),
    other_keys=("is",),
    samples_need=LOGITS,
    reference_needs=None,
    min_count=1,
    larger_is_better=True,
    compute=_score,
)
