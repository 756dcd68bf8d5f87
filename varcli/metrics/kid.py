"""Kernel distance: the squared maximum mean discrepancy with a cubic kernel; KID with Inception's pooled features."""

from __future__ import annotations

import torch

from varcli.errors import ShapeError
from varcli.metrics.arrays import Rows, bring_near, check_pair, float64_device, pieces
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
    features_ref, features_sample = bring_near(features_ref, device), bring_near(features_sample, device)
    n, m = len(features_ref), len(features_sample)
    within_ref = _kernel_sum(features_ref, features_ref, device) - _partner_sum(features_ref, features_ref, device)
    within_sample = _kernel_sum(features_sample, features_sample, device)
    within_sample -= _partner_sum(features_sample, features_sample, device)
    between = _kernel_sum(features_ref, features_sample, device)
    return within_ref / (n * (n - 1)) + within_sample / (m * (m - 1)) - 2 * between / (n * m)


def paired_kernel_distance(features_ref: Rows, features_sample: Rows, device: torch.device | str = "cpu") -> float:
    """Unbiased estimate where row i of one set belongs to row i of the other, as an image and its reconstruction do.

    Features (N, D) both. The kernel of a row with its partner is left out, since the two are not independent: Gretton et
    al., JMLR 13 (2012), Lemma 6, the estimate for sets of one size. `kernel_distance` would come out too small, below 0
    for equal sets; this one is then 0. Raises ShapeError for other shapes, NaN, or fewer than 2 rows.
    """
    check_pair(features_ref, features_sample, min_rows=2)
    if len(features_ref) != len(features_sample):
        raise ShapeError(
            f"pairs need as many features_sample as features_ref, {len(features_ref)}, not {len(features_sample)}"
        )
    device = float64_device(device)
    n = len(features_ref)
    total = 0.0
    for a, b, weight in (
        (features_ref, features_ref, 1),
        (features_sample, features_sample, 1),
        (features_ref, features_sample, -2),
    ):
        total += weight * (_kernel_sum(a, b, device) - _partner_sum(a, b, device))
    return total / (n * (n - 1))


def _kernel_sum(a: Rows, b: Rows, device: torch.device) -> float:
    """Sum of the kernel over all pairs of rows."""
    total = 0.0
    for _, x in pieces(a, _BLOCK, device):
        for _, y in pieces(b, _BLOCK, device):
            total += float((x @ y.T / x.shape[1] + 1).pow(3).sum())
    return total


def _partner_sum(a: Rows, b: Rows, device: torch.device) -> float:
    """Sum of the kernel of each row with the row of the same number."""
    pairs = zip(pieces(a, _BLOCK, device), pieces(b, _BLOCK, device), strict=True)
    return sum(float(((x * y).sum(dim=1) / x.shape[1] + 1).pow(3).sum()) for (_, x), (_, y) in pairs)


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
