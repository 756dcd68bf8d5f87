"""The order in which training sees the dataset: a pure function of (seed, position), with no state to save."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from varcli.errors import ConfigError

_ROUNDS = 8  # of the Feistel network; four are enough for large domains, tiny ones want more
_STEP = np.uint64(0x9E3779B97F4A7C15)
_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


@dataclass(frozen=True)
class ShuffledOrder:
    """An endless shuffled order over `num_items`: each epoch is another full permutation.

    Needs no memory for any number of items: a permutation is a Feistel network keyed by (seed, epoch), walked until it
    lands inside the range (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002).
    """

    num_items: int
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_items < 1:
            raise ConfigError(f"an order needs at least one item, but num_items is {self.num_items}")

    def indices(self, position: int, count: int) -> np.ndarray:
        """Return the items at global positions [position, position + count), int64.

        position: samples seen before, over all epochs. An epoch's end may lie anywhere inside the range.
        """
        positions = np.arange(position, position + count, dtype=np.int64)
        epochs = positions // self.num_items
        found = np.empty(count, np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            found[here] = self._permute(positions[here] % self.num_items, int(epoch))
        return found

    def _permute(self, offsets: np.ndarray, epoch: int) -> np.ndarray:
        half_bits = max(1, -(-max(1, (self.num_items - 1).bit_length()) // 2))
        keys = _hash(
            np.arange(_ROUNDS, dtype=np.uint64) + _hash(np.uint64(epoch) ^ _hash(np.uint64(self.seed % 2**64)))
        )
        values = offsets.astype(np.uint64)
        outside = np.arange(len(values))
        while len(outside):  # the domain is at most four times the range, so a few turns do
            values[outside] = _feistel(values[outside], keys, half_bits)
            outside = outside[values[outside] >= self.num_items]
        return values.astype(np.int64)


def _feistel(values: np.ndarray, keys: np.ndarray, half_bits: int) -> np.ndarray:
    """Permute [0, 4**half_bits)."""
    shift, mask = np.uint64(half_bits), np.uint64(2**half_bits - 1)
    left, right = values >> shift, values & mask
    for key in keys:
        left, right = right, left ^ (_hash(right ^ key) & mask)
    return (left << shift) | right


def _hash(value: np.ndarray | np.uint64) -> np.ndarray | np.uint64:
    """Mix 64 bits (splitmix64, Steele et al. 2014); wraps around by design."""
    with np.errstate(over="ignore"):
        value = value + _STEP
        value = (value ^ (value >> np.uint64(30))) * _MIX[0]
        value = (value ^ (value >> np.uint64(27))) * _MIX[1]
        return value ^ (value >> np.uint64(31))
