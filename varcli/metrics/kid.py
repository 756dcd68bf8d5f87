"""Kernel distance: the squared maximum mean discrepancy with a cubic kernel; KID with Inception's pooled features."""

from __future__ import annotations

import torch

from varcli.metrics.arrays import Rows, check_pair, float64_device, pieces
from varcli.metrics.base import FEATURES, FeatureSet, Metric

_BLOCK = 4096  # rows of either set; a block of kernel values takes 134 MB


def kernel_distance(features_ref: Rows, features_sample: Rows, device: torch.device | str = "cpu") -> float:
    """Unbiased estimate over all pairs of features (N, D) and (M, D), kernel (x.y / D + 1)^3; arXiv:1801.01401, Sec. 4.

    Unlike the Frechet distance its expectation does not depend on N, and is 0 for equal distributions, so it may come
    out below 0. Other tools average 100 random subsets of 1,000, which estimates the same number with more noise.
    Raises ShapeError for other shapes, NaN, or fewer than 2 rows.
    """
    check_pair(features_ref, features_sample, min_rows=2)
    device = float64_device(device)
    n, m = len(features_ref), len(features_sample)
    within_ref = _kernel_sum(features_ref, features_ref, device) - _self_sum(features_ref, device)
    within_sample = _kernel_sum(features_sample, features_sample, device) - _self_sum(features_sample, device)
    between = _kernel_sum(features_ref, features_sample, device)
    return within_ref / (n * (n - 1)) + within_sample / (m * (m - 1)) - 2 * between / (n * m)


def _kernel_sum(a: Rows, b: Rows, device: torch.device) -> float:
    """Sum of the kernel over all pairs of rows."""
    total = 0.0
    for _, x in pieces(a, _BLOCK, device):
        for _, y in pieces(b, _BLOCK, device):
            total += float((x @ y.T / x.shape[1] + 1).pow(3).sum())
    return total


def _self_sum(rows: Rows, device: torch.device) -> float:
    """Sum of the kernel of each row with itself."""
    return sum(float((x.square().sum(dim=1) / x.shape[1] + 1).pow(3).sum()) for _, x in pieces(rows, _BLOCK, device))


def _kid(samples: FeatureSet, reference: FeatureSet, device: torch.device) -> tuple[float]:
    return (kernel_distance(reference.features, samples.features, device),)


KID = Metric(
    keys=("kid",),
    other_keys=("kid",),
    samples_need=FEATURES,
    reference_needs=FEATURES,
    min_count=2,
    larger_is_better=False,
    compute=_kid,
)
