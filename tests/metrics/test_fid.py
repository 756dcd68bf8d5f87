"""Laws of the Frechet distance."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from varcli.errors import ShapeError
from varcli.metrics import fid as fid_module
from varcli.metrics import frechet_distance, frechet_from_stats
from varcli.metrics.base import FeatureSet
from varcli.metrics.fid import FID
from varcli.metrics.statistics import compute_statistics

RANDOM = np.random.default_rng(0)
FIRST, SECOND = RANDOM.normal(size=(40, 6)), RANDOM.normal(1, 2, size=(50, 6))


def test_a_set_is_at_distance_zero_from_itself():
    assert abs(frechet_distance(FIRST, FIRST)) <= 1e-10


def test_it_is_symmetric():
    assert frechet_distance(FIRST, SECOND) == pytest.approx(frechet_distance(SECOND, FIRST), rel=1e-12)


def test_a_shift_adds_its_squared_length():
    shift = np.array([3.0, 0, 0, 0, 4.0, 0])
    assert frechet_distance(FIRST, FIRST + shift) == pytest.approx(25, rel=1e-9)


def test_in_one_dimension_it_is_worked_by_hand():
    # means 0 and 3, standard deviations 1 and 2: 3^2 + (1 - 2)^2
    assert frechet_from_stats(np.zeros(1), np.eye(1), np.full(1, 3.0), 4 * np.eye(1)) == pytest.approx(10)


def test_both_routes_give_the_same(monkeypatch):
    directly = frechet_distance(FIRST, SECOND)
    monkeypatch.setattr(fid_module, "_MAX_FACTORED_ROWS", 10)
    assert frechet_distance(FIRST, SECOND) == pytest.approx(directly, rel=1e-10)


def test_fewer_images_than_features_are_defined():
    few = RANDOM.normal(size=(3, 20))
    stats = [compute_statistics(rows) for rows in (few, few * 2)]
    by_statistics = frechet_from_stats(stats[0].mean, stats[0].covariance, stats[1].mean, stats[1].covariance)
    assert frechet_distance(few, few * 2) == pytest.approx(by_statistics, rel=1e-7)


def test_tensors_and_arrays_of_any_float_give_the_same():
    single = FIRST.astype(np.float32)
    assert frechet_distance(torch.from_numpy(single), SECOND) == frechet_distance(single, SECOND)


def test_stored_statistics_win_over_rows():
    stored = compute_statistics(SECOND)
    reference = FeatureSet(features=FIRST, statistics=stored)
    (value,) = FID.compute(FeatureSet(features=FIRST), reference, torch.device("cpu"))
    assert value == pytest.approx(frechet_distance(SECOND, FIRST), rel=1e-9)


@pytest.mark.parametrize(
    ("reference", "sample", "message"),
    [
        (FIRST, FIRST[0], r"must have shape \(N, D\)"),
        (FIRST, FIRST[:, :5], "6 columns"),
        (FIRST, FIRST[:1], "at least 2 rows"),
        (FIRST, np.where(np.arange(40)[:, None] == 7, np.nan, FIRST), "first in row 7"),
        (FIRST, FIRST.astype(int), "must hold floats"),
        (FIRST, FIRST.tolist(), "is a list"),
    ],
)
def test_what_are_no_features_is_refused(reference, sample, message):
    with pytest.raises(ShapeError, match=message):
        frechet_distance(reference, sample)
