"""Mean and covariance of features: computed in one pass over any number of pieces, merged exactly, checked when read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

from varcli.errors import ShapeError
from varcli.metrics.arrays import Rows, check_rows, float64_device, pieces

_ASYMMETRY = 1e-6  # of the largest entry; float32 files stay below it
_NEGATIVE = 1e-5  # of the largest eigenvalue; rounding a 2048 x 2048 matrix to float32 moves eigenvalues by 3e-6


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """Mean (D,) and unbiased covariance (D, D) of a set of features, float64."""

    mean: np.ndarray
    covariance: np.ndarray
    count: int | None = None  # images they were computed from; None where a file does not say

    @property
    def num_features(self) -> int:
        """D."""
        return len(self.mean)


def check_statistics(name: str, mean: np.ndarray, covariance: np.ndarray, count: int | None = None) -> Statistics:
    """Build Statistics from arrays of a file.

    Raises ShapeError naming the property that fails: real numbers, matching shapes, finite, symmetric, no negative
    eigenvalues (both within what rounding to float32 does).
    """
    for part, array, dimensions in (("mean", mean, 1), ("covariance", covariance, 2)):
        if not np.issubdtype(array.dtype, np.floating):
            raise ShapeError(f"{name}: the {part} must hold floats, but holds {array.dtype}")
        if array.ndim != dimensions or not array.size:
            raise ShapeError(f"{name}: the {part} must have {dimensions} dimensions, but has shape {array.shape}")
        if not np.isfinite(array).all():
            raise ShapeError(f"{name}: the {part} holds NaN or infinity", "make the statistics again")
    if covariance.shape != (len(mean), len(mean)):
        raise ShapeError(f"{name}: a mean of {len(mean)} entries does not go with a covariance of {covariance.shape}")
    covariance = covariance.astype(np.float64)
    largest = float(np.abs(covariance).max())
    if float(np.abs(covariance - covariance.T).max()) > _ASYMMETRY * largest:
        raise ShapeError(f"{name}: the covariance is not symmetric", "make the statistics again")
    covariance = (covariance + covariance.T) / 2
    values = np.linalg.eigvalsh(covariance)
    if values[0] < -_NEGATIVE * max(values[-1], 0) or values[-1] < 0:
        raise ShapeError(
            f"{name}: the covariance has the negative eigenvalue {values[0]:.3g}", "make the statistics again"
        )
    return Statistics(mean=mean.astype(np.float64), covariance=covariance, count=count)


class RunningStatistics:
    """Mean and covariance of rows that arrive in pieces, in float64.

    Pieces are centred on their own mean before they are squared and joined by the exact rule for two sets (Chan, Golub
    and LeVeque, 1979), so neither the number of pieces nor a large mean costs digits.
    """

    def __init__(self) -> None:
        self.count = 0
        self._mean: Tensor | None = None
        self._scatter: Tensor | None = None  # sum of outer products of centred rows

    def update(self, rows: Tensor) -> None:
        """Add rows (n, D), on the device where the sums shall live."""
        rows = rows.to(float64_device(rows.device), torch.float64)
        mean = rows.mean(dim=0)
        centred = rows - mean
        self._join(len(rows), mean, centred.T @ centred)

    def merge(self, other: Self) -> None:
        """Add everything `other` has seen."""
        if other._mean is not None and other._scatter is not None:
            self._join(other.count, other._mean, other._scatter)

    def finish(self) -> Statistics:
        """Return the statistics. Raises ShapeError below two rows, where there is no covariance."""
        if self._mean is None or self._scatter is None or self.count < 2:
            raise ShapeError(f"a covariance needs at least 2 rows, but there are {self.count}")
        covariance = self._scatter / (self.count - 1)
        return Statistics(mean=self._mean.cpu().numpy(), covariance=covariance.cpu().numpy(), count=self.count)

    def _join(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        if self._mean is None or self._scatter is None:
            self.count, self._mean, self._scatter = count, mean.clone(), scatter.clone()
            return
        total = self.count + count
        shift = mean.to(self._mean) - self._mean
        self._scatter += scatter.to(self._scatter) + torch.outer(shift, shift) * (self.count * count / total)
        self._mean += shift * (count / total)
        self.count = total


def compute_statistics(features: Rows, device: torch.device | str = "cpu", piece: int = 4096) -> Statistics:
    """Return mean and covariance of features (N, D), reading `piece` rows at a time."""
    check_rows("features", features, min_rows=2)
    running = RunningStatistics()
    for _, rows in pieces(features, piece, float64_device(device)):
        running.update(rows)
    return running.finish()
