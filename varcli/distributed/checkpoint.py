"""Sharded tensors to pieces that each process writes by itself, and back into any other number of shards.

A set of tensors that is spread over n processes becomes n pieces, numbered from 0. Piece i holds rows `chunk(length, n, i)`
of every sharded tensor's first dimension, and piece 0 all tensors that are not sharded. A tensor of fewer rows than pieces
has none in the last ones, and stands there with no rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from varcli.distributed.context import World
from varcli.distributed.parallelize import is_shard
from varcli.errors import ShapeError


@dataclass(frozen=True)
class Piece:
    """What one process writes of a set of tensors."""

    tensors: dict[str, Tensor]
    index: int  # number of this piece
    count: int  # pieces of the set


def chunk(length: int, count: int, index: int) -> range:
    """Rows that shard `index` of `count` has of `length`, as FSDP2 and `torch.chunk` cut."""
    size = -(-length // count)
    return range(min(index * size, length), min((index + 1) * size, length))


def cut(tensors: Mapping[str, Tensor], world: World) -> Piece | None:
    """Return this process's piece of a set of tensors, or None if another process has the same one.

    Nothing is exchanged, and nothing copied.
    """
    shards = [tensor for tensor in tensors.values() if is_shard(tensor)]
    if not shards:
        return Piece(dict(tensors), 0, 1) if world.is_first else None
    index, count, is_copy = _place(shards[0])
    if is_copy:
        return None
    own = {name: tensor.to_local() if is_shard(tensor) else tensor for name, tensor in tensors.items()}
    return Piece({name: own[name] for name in own if index == 0 or is_shard(tensors[name])}, index, count)


class Joiner:
    """Puts the pieces of a set of tensors together again, as far as this process needs them.

    layout: returns the tensor of this process that one of a name is laid out like, or None to have it whole. count: pieces.
    """

    def __init__(self, layout: Callable[[str], Tensor | None], count: int) -> None:
        self.layout, self.count = layout, count
        self._found: dict[str, list[Tensor]] = {}

    def needs(self, index: int) -> bool:
        """Say whether piece `index` holds anything that is needed here; piece 0, which names all tensors, comes first."""
        if index == 0:
            return True
        targets = {name: self._target(name, pieces[0]) for name, pieces in self._found.items() if pieces[0].ndim}
        return any(target is None or self._overlap(target, index) for target in targets.values())

    def add(self, index: int, name: str, tensor: Tensor) -> None:
        """Take a tensor of piece `index`; the pieces come in order.

        Raises ShapeError if it has other rows than this piece has of such a tensor.
        """
        target = self._target(name, tensor)
        pieces = self._found.setdefault(name, [])
        if target is None:
            pieces.append(tensor)
            return
        rows = chunk(target.shape[0], self.count, index)
        if tensor.shape != (len(rows), *target.shape[1:]):
            raise ShapeError(f"`{name}` must have shape {tuple(target.shape)}, but another was stored")
        wanted = self._overlap(target, index)
        # a copy, so that the piece's memory is free again
        pieces.append(tensor[wanted.start - rows.start : wanted.stop - rows.start].clone())

    def join(self) -> dict[str, Tensor]:
        """Return all tensors by name: whole ones as they came, shards on the device of their layouts."""
        joined = {}
        for name, pieces in self._found.items():
            target, tensor = self._target(name, pieces[0]), pieces[0] if len(pieces) == 1 else torch.cat(pieces)
            joined[name] = tensor if target is None else _like(target, tensor)
        return joined

    def _target(self, name: str, tensor: Tensor) -> Tensor | None:
        target = self.layout(name) if tensor.ndim else None
        return target if is_shard(target) else None

    def _overlap(self, target: Tensor, index: int) -> range:
        own_index, own_count, _ = _place(target)
        own, there = (chunk(target.shape[0], *place) for place in ((own_count, own_index), (self.count, index)))
        start = max(own.start, there.start)
        return range(start, max(start, min(own.stop, there.stop)))


def _place(tensor: Any) -> tuple[int, int, bool]:
    """Which shard of a tensor this process has, of how many, and whether an earlier process has the same one."""
    mesh = tensor.device_mesh
    coordinate = mesh.get_coordinate()
    return coordinate[-1], mesh.size(mesh.ndim - 1), any(coordinate[:-1])


def _like(target: Any, local: Tensor) -> Tensor:
    """Make a sharded tensor of its rows here, laid out like `target`."""
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        local.to(target.device),
        target.device_mesh,
        target.placements,
        run_check=False,
        shape=target.shape,
        stride=target.stride(),
    )
