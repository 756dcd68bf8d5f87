"""Batches are a pure function of seed and step; an epoch visits every image once, views take turns."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from varcli.data.codes import CodesSplit
from varcli.errors import DataError
from varcli.training.source import CodesSource

CPU = torch.device("cpu")


def make_split(views: list[int]) -> CodesSplit:
    """Images with so many views each; every code of a row is the row's number, beyond int16 too."""
    sources = torch.arange(len(views)).repeat_interleave(torch.tensor(views)).to(torch.int32)
    rows = torch.arange(len(sources))
    return CodesSplit((rows.unsqueeze(1).repeat(1, 3) + 40_000).to(torch.uint16), rows % 5, sources)


def test_an_epoch_visits_every_image_once_and_its_views_in_turn():
    split = make_split([3] * 7 + [1, 2])
    source = CodesSource(split, 4, seed=1, device=CPU)
    assert source.num_images == 9
    seen = Counter()
    for epoch in range(6):
        rows = source.rows(epoch * 9, 9)
        assert sorted(split.sources[rows].tolist()) == list(range(9))
        seen.update(rows.tolist())
    assert [seen[row] for row in range(24)] == [2] * 21 + [6, 3, 3]


def test_samples_do_not_depend_on_the_batch_size_or_on_where_one_begins():
    split = make_split([2] * 11)
    small, large = (CodesSource(split, size, seed=3, device=CPU) for size in (2, 6))
    for step in (5, 0, 3000, 1):
        codes, labels = large.batch(step)
        pieces = [small.batch(3 * step + part) for part in range(3)]
        assert torch.equal(codes, torch.cat([piece[0] for piece in pieces]))
        assert torch.equal(labels, torch.cat([piece[1] for piece in pieces]))


def test_codes_arrive_as_they_were_stored():
    split = make_split([1] * 6)
    source = CodesSource(split, 6, seed=0, device=CPU)
    codes, labels = source.batch(0)
    assert codes.dtype == labels.dtype == torch.int64
    rows = source.rows(0, 6)
    assert np.array_equal(codes[:, 0].numpy(), rows + 40_000)
    assert np.array_equal(labels.numpy(), rows % 5)


def test_all_rows_come_in_order_or_thinned_evenly():
    source = CodesSource(make_split([2] * 5), 4, seed=0, device=CPU)
    assert torch.cat([codes for codes, _ in source.all_rows(4)])[:, 0].tolist() == list(range(40_000, 40_010))
    assert torch.cat([codes for codes, _ in source.all_rows(4, 3)])[:, 0].tolist() == [40_000, 40_004, 40_009]


def test_another_seed_is_another_order():
    split = make_split([1] * 50)
    first, second = (CodesSource(split, 50, seed, CPU).rows(0, 50).tolist() for seed in (0, 1))
    assert first != second


def test_nothing_to_train_on_is_refused():
    with pytest.raises(DataError):
        CodesSource(CodesSplit(torch.zeros(0, 3, dtype=torch.uint16), torch.zeros(0), torch.zeros(0)), 4, 0, CPU)
