"""Laws of streamed statistics, and what is refused in stored ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from varcli.errors import ShapeError
from varcli.metrics.statistics import RunningStatistics, check_statistics, compute_statistics

ROWS = np.random.default_rng(0).normal(1000, 1, size=(101, 7))  # a large mean beside a small spread


def test_they_are_mean_and_unbiased_covariance():
    found = compute_statistics(ROWS, piece=10)
    assert np.allclose(found.mean, ROWS.mean(axis=0), rtol=1e-14)
    assert np.allclose(found.covariance, np.cov(ROWS, rowvar=False), rtol=1e-10, atol=1e-12)
    assert found.count == 101


def test_pieces_and_merges_do_not_change_them():
    whole = compute_statistics(ROWS, piece=1000)
    parts = [RunningStatistics() for _ in range(3)]
    for number, row in enumerate(ROWS):
        parts[number % 3].update(torch.from_numpy(row[None]))
    merged = RunningStatistics()
    for part in [*parts, RunningStatistics()]:
        merged.merge(part)
    found = merged.finish()
    assert found.count == whole.count
    assert np.allclose(found.mean, whole.mean, rtol=1e-14)
    assert np.allclose(found.covariance, whole.covariance, rtol=1e-10, atol=1e-12)


def test_one_row_has_no_covariance():
    running = RunningStatistics()
    running.update(torch.zeros(1, 3))
    with pytest.raises(ShapeError, match="at least 2 rows"):
        running.finish()


def test_stored_ones_may_be_rounded_to_float32():
    found = compute_statistics(ROWS)
    checked = check_statistics("file", found.mean.astype(np.float32), found.covariance.astype(np.float32))
    assert checked.covariance.dtype == np.float64


@pytest.mark.parametrize(
    ("mean", "covariance", "message"),
    [
        (np.zeros(3), np.diag([1.0, 1, -0.5]), "negative eigenvalue"),
        (np.zeros(3), np.array([[1.0, 0, 0], [1, 1, 0], [0, 0, 1]]), "not symmetric"),
        (np.zeros(2), np.eye(3), "does not go with"),
        (np.full(3, np.nan), np.eye(3), "NaN"),
        (np.zeros(3), np.full((3, 3), np.inf), "NaN or infinity"),
        (np.zeros(3, complex), np.eye(3), "must hold floats"),
        (np.zeros(3), np.eye(3, dtype=int), "must hold floats"),
        (np.zeros((1, 3)), np.eye(3), "1 dimensions"),
    ],
)
def test_what_cannot_be_statistics_is_refused_by_the_property_that_fails(mean, covariance, message):
    with pytest.raises(ShapeError, match=message):
        check_statistics("file", mean, covariance)
