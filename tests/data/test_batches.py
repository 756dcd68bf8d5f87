"""The shuffled order is a pure function of (seed, position)."""

from __future__ import annotations

import numpy as np
import pytest

from varcli.data.batches import ShuffledOrder
from varcli.errors import ConfigError


@pytest.mark.parametrize("num_items", [1, 2, 3, 7, 64, 65, 1000, 4096])
def test_each_epoch_covers_every_item_exactly_once(num_items):
    order = ShuffledOrder(num_items, seed=5)
    for epoch in range(3):
        assert sorted(order.indices(epoch * num_items, num_items)) == list(range(num_items))


def test_any_cut_gives_the_same_order():
    order = ShuffledOrder(101, seed=1)
    whole = order.indices(0, 505)
    for sizes in ([505], [1] * 505, [7, 300, 198], [101] * 5):
        starts = np.cumsum([0, *sizes[:-1]])
        parts = [order.indices(int(start), size) for start, size in zip(starts, sizes, strict=True)]
        assert np.array_equal(np.concatenate(parts), whole)


def test_epochs_and_seeds_differ():
    first = ShuffledOrder(1000, seed=0)
    assert not np.array_equal(first.indices(0, 1000), first.indices(1000, 1000))
    assert not np.array_equal(first.indices(0, 1000), ShuffledOrder(1000, seed=1).indices(0, 1000))


def test_the_order_is_well_mixed():
    # an item's place is uniform: correlation with the item's number is 0 +- 1/sqrt(n); neighbours are no more alike
    places = ShuffledOrder(10000, seed=3).indices(0, 10000).astype(float)
    assert abs(np.corrcoef(places, np.arange(10000))[0, 1]) < 0.04
    assert abs(np.corrcoef(places[1:], places[:-1])[0, 1]) < 0.04


def test_over_many_epochs_every_item_comes_first_about_equally_often():
    order = ShuffledOrder(8, seed=0)
    firsts = [int(order.indices(epoch * 8, 1)[0]) for epoch in range(1600)]
    counts = np.bincount(firsts, minlength=8)
    assert counts.min() > 150  # expected 200 +- 13 (one standard deviation)
    assert counts.max() < 250


def test_an_order_over_nothing_is_refused():
    with pytest.raises(ConfigError):
        ShuffledOrder(0)
