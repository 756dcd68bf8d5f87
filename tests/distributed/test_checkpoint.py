"""Pieces of sharded tensors: how they are cut, and put together where nothing is sharded. Shards: test_transformer_ranks."""

from __future__ import annotations

import pytest
import torch

from varcli.distributed import World
from varcli.distributed.checkpoint import Joiner, chunk, cut


@pytest.mark.parametrize("length", [1, 2, 5, 8, 17])
@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_chunks_are_those_of_torch(length, count):
    expected = [part.tolist() for part in torch.arange(length).chunk(count)]
    found = [list(chunk(length, count, index)) for index in range(count)]
    assert [part for part in found if part] == expected


def test_what_is_not_sharded_is_one_piece_of_the_first_process():
    tensors = {"a": torch.ones(2), "b": torch.zeros(())}
    piece = cut(tensors, World(0, 4))
    assert (piece.index, piece.count) == (0, 1) and piece.tensors == tensors
    assert cut(tensors, World(1, 4)) is None


def test_pieces_come_together_where_nothing_is_sharded():
    whole = {"matrix": torch.arange(10.0).view(5, 2), "bias": torch.arange(1.0), "step": torch.tensor(7.0)}
    joiner = Joiner(whole.get, 3)
    for index in range(3):
        assert joiner.needs(index)
        for name, tensor in whole.items():
            if tensor.ndim or index == 0:
                rows = chunk(len(tensor), 3, index) if tensor.ndim else None
                joiner.add(index, name, tensor if rows is None else tensor[rows.start : rows.stop])
    found = joiner.join()
    assert found.keys() == whole.keys() and all(torch.equal(found[name], whole[name]) for name in whole)
