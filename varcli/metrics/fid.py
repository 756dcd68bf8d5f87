"""Frechet distance between two sets of features: FID with Inception's pooled features, sFID with its spatial ones."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from varcli.metrics.arrays import Rows, check_pair, float64_device
from varcli.metrics.base import SPATIAL_STATISTICS, STATISTICS, FeatureSet, Metric
from varcli.metrics.statistics import Statistics, check_statistics, compute_statistics

_MAX_FACTORED_ROWS = 4096  # above it the covariance is cheaper than a factorisation of the features, and precise enough


def frechet_distance(features_ref: Rows, features_sample: Rows, device: torch.device | str = "cpu") -> float:
    """Frechet distance of the two normal distributions fitted to features (N, D) and (M, D).

    |mu1 - mu2|^2 + tr S1 + tr S2 - 2 tr sqrt(S1 S2) with unbiased covariances; arXiv:1706.08500, Eq. 6. It is biased
    upward for few images, so compare equal N only. Raises ShapeError for other shapes, NaN, or fewer than 2 rows.
    """
    check_pair(features_ref, features_sample, min_rows=2)
    device = float64_device(device)
    if max(len(features_ref), len(features_sample)) > _MAX_FACTORED_ROWS:
        reference, sample = (compute_statistics(rows, device) for rows in (features_ref, features_sample))
        return frechet_of_statistics(reference, sample, device)
    (mean1, factor1), (mean2, factor2) = (_factor(rows, device) for rows in (features_ref, features_sample))
    return _distance(mean1, factor1, mean2, factor2)


def frechet_from_stats(mean1: np.ndarray, covariance1: np.ndarray, mean2: np.ndarray, covariance2: np.ndarray) -> float:
    """Frechet distance from means (D,) and covariances (D, D). Raises ShapeError if one of them cannot be such."""
    return frechet_of_statistics(
        check_statistics("first statistics", np.asarray(mean1), np.asarray(covariance1)),
        check_statistics("second statistics", np.asarray(mean2), np.asarray(covariance2)),
    )


def frechet_of_statistics(reference: Statistics, sample: Statistics, device: torch.device | str = "cpu") -> float:
    """Frechet distance between checked statistics. Raises ShapeError if their numbers of features differ."""
    check_pair(reference.mean[None], sample.mean[None])
    device = float64_device(device)
    parts = []
    for statistics in (reference, sample):
        covariance = torch.as_tensor(statistics.covariance).to(device)
        values, vectors = torch.linalg.eigh(covariance)
        parts += [torch.as_tensor(statistics.mean).to(device), (vectors * values.clamp(min=0).sqrt()).T]
    return _distance(*parts)


def _factor(rows: Rows, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the mean and a matrix R with R' R = covariance, without squaring the features."""
    features = torch.as_tensor(rows).to(device, torch.float64)
    mean = features.mean(dim=0)
    centred = (features - mean) / (len(features) - 1) ** 0.5
    return mean, torch.linalg.qr(centred, mode="r").R


def _distance(mean1: Tensor, factor1: Tensor, mean2: Tensor, factor2: Tensor) -> float:
    # tr sqrt(S1 S2) is the sum of the singular values of R1 R2'; square roots of the eigenvalues of S1 S2 would lose
    # half the digits where the covariances are rank-deficient
    trace = torch.linalg.svdvals(factor1 @ factor2.T).sum()
    gap = (mean1 - mean2).square().sum()
    return float(gap + factor1.square().sum() + factor2.square().sum() - 2 * trace)


def _fid(samples: FeatureSet, reference: FeatureSet, device: torch.device) -> tuple[float]:
    return (_compare(reference.statistics, reference.features, samples.statistics, samples.features, device),)


def _sfid(samples: FeatureSet, reference: FeatureSet, device: torch.device) -> tuple[float]:
    return (
        _compare(reference.spatial_statistics, reference.spatial, samples.spatial_statistics, samples.spatial, device),
    )


def _compare(
    stored_ref: Statistics | None,
    rows_ref: Rows | None,
    stored_sample: Statistics | None,
    rows_sample: Rows | None,
    device: torch.device,
) -> float:
    """Stored statistics win over rows: they stand for the whole data set."""
    if stored_ref is None and stored_sample is None:
        return frechet_distance(rows_ref, rows_sample, device)
    return frechet_of_statistics(
        stored_ref or compute_statistics(rows_ref, device), stored_sample or compute_statistics(rows_sample, device)
    )


FID = Metric(
    keys=("fid",),
    other_keys=("fd",),
    samples_need=STATISTICS,
    reference_needs=STATISTICS,
    min_count=2,
    larger_is_better=False,
    compute=_fid,
)
SFID = Metric(
    keys=("sfid",),
    other_keys=None,
    samples_need=SPATIAL_STATISTICS,
    reference_needs=SPATIAL_STATISTICS,
    min_count=2,
    larger_is_better=False,
    compute=_sfid,
)
