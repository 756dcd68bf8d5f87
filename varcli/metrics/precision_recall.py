"""Precision and recall: how much of one set lies within the other's neighbourhoods (arXiv:1904.06991, Eq. 1 and 2)."""

from __future__ import annotations

import torch

from varcli.metrics.arrays import Rows, check_pair, float64_device
from varcli.metrics.base import FEATURES, FeatureSet, Metric
from varcli.metrics.distances import nearest_radii, squared_distances

NUM_NEIGHBOURS = 3  # of published numbers


def precision_recall(
    features_ref: Rows, features_sample: Rows, k: int = NUM_NEIGHBOURS, device: torch.device | str = "cpu"
) -> tuple[float, float]:
    """Return precision (realism of the samples) and recall (their coverage of the reference), both in [0, 1].

    Features (N, D) and (M, D). Precision is the share of samples within the ball of some reference row, recall the share
    of reference rows within the ball of some sample; a ball reaches to the k-th nearest row of its own set, edge included.
    As in the evaluator of arXiv:2105.05233, but without its float16, which biases both upward.
    Raises ShapeError for other shapes, NaN, or no more than k rows.
    """
    check_pair(features_ref, features_sample)
    device = float64_device(device)
    radii_ref, radii_sample = (nearest_radii(rows, k, device) for rows in (features_ref, features_sample))
    is_real = torch.zeros(len(features_sample), dtype=torch.bool, device=device)
    is_covered = torch.zeros(len(features_ref), dtype=torch.bool, device=device)
    for part in squared_distances(features_ref, features_sample, device):
        distance = part.squared - part.slack
        is_real[part.rows_b] |= (distance <= radii_ref[part.rows_a, None]).any(dim=0)
        is_covered[part.rows_a] |= (distance <= radii_sample[part.rows_b]).any(dim=1)
    return float(is_real.double().mean()), float(is_covered.double().mean())


def _both(samples: FeatureSet, reference: FeatureSet, device: torch.device) -> tuple[float, float]:
    return precision_recall(reference.features, samples.features, device=device)


PRECISION_RECALL = Metric(
    keys=("precision", "recall"),
    other_keys=("precision", "recall"),
    samples_need=FEATURES,
    reference_needs=FEATURES,
    min_count=NUM_NEIGHBOURS + 1,
    larger_is_better=True,
    compute=_both,
)
