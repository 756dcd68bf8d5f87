"""Density and coverage: precision and recall that single outliers cannot move (arXiv:2002.09797, Eq. 4 and 5)."""

from __future__ import annotations

import torch

from varcli.metrics.arrays import Rows, check_pair, float64_device
from varcli.metrics.base import FEATURES, FeatureSet, Metric
from varcli.metrics.distances import nearest_radii, squared_distances

NUM_NEIGHBOURS = 5  # of published numbers


def density_coverage(
    features_ref: Rows, features_sample: Rows, k: int = NUM_NEIGHBOURS, device: torch.device | str = "cpu"
) -> tuple[float, float]:
    """Return density (about 1 for equal sets, may exceed it) and coverage (in [0, 1]).

    Features (N, D) and (M, D). Density is the mean number of reference balls a sample lies in, divided by k; coverage the
    share of reference balls that hold a sample. Balls as in `precision_recall`, but without their edge.
    Raises ShapeError for other shapes, NaN, or no more than k rows.
    """
    check_pair(features_ref, features_sample)
    device = float64_device(device)
    radii_ref = nearest_radii(features_ref, k, device)
    num_inside = 0
    holds_sample = torch.zeros(len(features_ref), dtype=torch.bool, device=device)
    for part in squared_distances(features_ref, features_sample, device):
        inside = part.squared + part.slack < radii_ref[part.rows_a, None]
        num_inside += int(inside.sum())
        holds_sample[part.rows_a] |= inside.any(dim=1)
    return num_inside / (k * len(features_sample)), float(holds_sample.double().mean())


def _both(samples: FeatureSet, reference: FeatureSet, device: torch.device) -> tuple[float, float]:
    return density_coverage(reference.features, samples.features, device=device)


DENSITY_COVERAGE = Metric(
    keys=("density", "coverage"),
    other_keys=("density", "coverage"),
    samples_need=FEATURES,
    reference_needs=FEATURES,
    min_count=NUM_NEIGHBOURS + 1,
    larger_is_better=True,
    compute=_both,
)
