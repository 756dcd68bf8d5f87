"""Laws of distances, neighbourhoods, and the metrics made of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from varcli.errors import ConfigError, ShapeError
from varcli.metrics import density_coverage, kernel_distance, precision_recall
from varcli.metrics.distances import nearest_radii, squared_distances
from varcli.metrics.kid import paired_kernel_distance

RANDOM = np.random.default_rng(0)
FIRST, SECOND = RANDOM.normal(size=(30, 5)), RANDOM.normal(0.5, 1, size=(41, 5))


def assemble(a: np.ndarray, b: np.ndarray, block: int) -> np.ndarray:
    whole = np.empty((len(a), len(b)))
    for part in squared_distances(a, b, block=block):
        whole[part.rows_a, part.rows_b] = part.squared
    return whole


@pytest.mark.parametrize("block", [7, 1000])
def test_blocks_cover_all_pairs(block):
    direct = np.square(FIRST[:, None] - SECOND[None]).sum(axis=2)
    assert np.allclose(assemble(FIRST, SECOND, block), direct, rtol=1e-12)
    order = np.sort(np.square(FIRST[:, None] - FIRST[None]).sum(axis=2), axis=1)
    assert np.allclose(nearest_radii(FIRST, 4, block=block).numpy(), order[:, 4], rtol=1e-12)


def test_a_set_covers_itself():
    assert precision_recall(FIRST, FIRST) == (1, 1)
    assert density_coverage(FIRST, FIRST, k=3)[1] == 1


def test_far_sets_do_not_meet():
    assert precision_recall(FIRST, FIRST + 100) == (0, 0)
    assert density_coverage(FIRST, FIRST + 100) == (0, 0)


def test_precision_and_recall_change_places_with_the_sets():
    assert precision_recall(FIRST, SECOND) == precision_recall(SECOND, FIRST)[::-1]


def test_a_narrow_set_is_precise_and_covers_little():
    precision, recall = precision_recall(FIRST, np.repeat(FIRST[:2], 20, axis=0))
    assert precision == 1
    assert recall == pytest.approx(2 / 30)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_equal_rows_lie_in_balls_of_radius_zero(scale):
    # five copies of each row, so every radius is 0; distances come from products, which round
    rows = (RANDOM.normal(size=(8, 300)) * scale).astype(np.float32)
    copies = np.repeat(rows, 5, axis=0)
    assert precision_recall(copies, copies[RANDOM.permutation(40)]) == (1, 1)
    assert precision_recall(copies, copies + np.float32(scale)) == (0, 0)


def test_points_on_the_edge_are_inside():
    line = np.arange(5.0)[:, None]  # with k = 1 each ball reaches exactly to the next point
    assert precision_recall(line, np.array([[5.0], [-1.0], [5.5]]), k=1)[0] == pytest.approx(2 / 3)
    assert density_coverage(line, np.array([[5.0], [-1.0], [0.5]]), k=1) == (2 / 3, 2 / 5)


def test_too_few_rows_and_silly_neighbourhoods_are_refused():
    with pytest.raises(ShapeError, match="at least 4 rows"):
        precision_recall(FIRST, SECOND[:3])
    with pytest.raises(ConfigError):
        nearest_radii(FIRST, 0)


def test_kernel_distance_is_the_mean_over_distinct_pairs():
    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (a @ b.T / 5 + 1) ** 3

    def off_diagonal(a: np.ndarray) -> float:
        return kernel(a, a)[~np.eye(len(a), dtype=bool)].mean()

    direct = off_diagonal(FIRST) + off_diagonal(SECOND) - 2 * kernel(FIRST, SECOND).mean()
    assert kernel_distance(FIRST, SECOND) == pytest.approx(direct, rel=1e-10)
    assert kernel_distance(torch.from_numpy(FIRST), SECOND) == pytest.approx(direct, rel=1e-10)


def test_paired_kernel_distance_leaves_out_each_row_with_its_partner():
    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (a @ b.T / a.shape[1] + 1) ** 3

    other = FIRST + np.random.default_rng(1).normal(size=FIRST.shape)
    apart = ~np.eye(len(FIRST), dtype=bool)
    direct = sum(
        weight * kernel(a, b)[apart].mean()
        for a, b, weight in ((FIRST, FIRST, 1), (other, other, 1), (FIRST, other, -2))
    )
    assert paired_kernel_distance(FIRST, other) == pytest.approx(direct, rel=1e-9)


def test_paired_kernel_distance_of_a_set_with_itself_is_zero_where_the_other_is_below():
    assert paired_kernel_distance(FIRST, FIRST) == pytest.approx(0, abs=1e-9)
    assert kernel_distance(FIRST, FIRST) < -1e-3
    with pytest.raises(ShapeError, match="pairs need as many"):
        paired_kernel_distance(FIRST, FIRST[1:])


def test_kernel_distance_of_equal_distributions_is_zero_on_average():
    values = [kernel_distance(*np.split(RANDOM.normal(size=(40, 5)), 2)) for _ in range(200)]
    assert abs(np.mean(values)) < 4 * np.std(values) / 200**0.5
    assert min(values) < 0
