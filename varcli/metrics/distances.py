"""Squared distances between rows of two sets, in blocks that fit into memory, and the neighbourhoods they define.

All in float64: then rounding is some 1e-13 of a squared norm, far below any distance that matters, and a tie between
two distances can be told from a difference. Values closer than that rounding count as equal, so that two equal rows are
at distance zero and a point lies on its own ball's edge, whatever the order in which the machine adds.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from varcli.errors import ConfigError, ShapeError
from varcli.metrics.arrays import Rows, bring_near, float64_device, pieces

_BLOCK = 4096  # rows of either set; a block of distances takes 134 MB
_ROUNDING = 64 * torch.finfo(torch.float64).eps  # of the squared norms; seen: up to 4 eps at 2048 columns


@dataclass(frozen=True)
class Block:
    """Distances between some rows of `a` and some rows of `b`."""

    first_a: int  # number of the block's first row in a
    first_b: int
    squared: Tensor  # float64 (rows of a, rows of b), not negative
    slack: Tensor  # same shape; differences below it are rounding

    @property
    def rows_a(self) -> slice:
        """The block's rows in a."""
        return slice(self.first_a, self.first_a + self.squared.shape[0])

    @property
    def rows_b(self) -> slice:
        """The block's rows in b."""
        return slice(self.first_b, self.first_b + self.squared.shape[1])


def squared_distances(a: Rows, b: Rows, device: torch.device | str = "cpu", block: int = _BLOCK) -> Iterator[Block]:
    """Yield the squared Euclidean distances of all rows of `a` (N, D) to all rows of `b` (M, D), block by block."""
    device = float64_device(device)
    a, b = bring_near(a, device), bring_near(b, device)
    for first_a, x in pieces(a, block, device):
        norms_x = x.square().sum(dim=1, keepdim=True)
        for first_b, y in pieces(b, block, device):
            norms = norms_x + y.square().sum(dim=1)
            squared = torch.addmm(norms, x, y.T, alpha=-2).clamp_(min=0)
            yield Block(first_a, first_b, squared, norms.mul_(_ROUNDING))


def nearest_radii(features: Rows, k: int, device: torch.device | str = "cpu", block: int = _BLOCK) -> Tensor:
    """Return for each row the squared distance to its k-th nearest other row, float64 (N,).

    That is the (k + 1)-th smallest distance to the set it belongs to, itself included; copies of a row count.
    Raises ConfigError if k < 1, ShapeError unless N > k.
    """
    if k < 1:
        raise ConfigError(f"k must be at least 1, but is {k}")
    if len(features) <= k:
        raise ShapeError(f"neighbourhoods of {k} need at least {k + 1} rows, but there are {len(features)}")
    device = float64_device(device)
    smallest = torch.full((len(features), k + 1), torch.inf, dtype=torch.float64, device=device)
    for part in squared_distances(features, features, device, block):
        candidates = torch.cat([smallest[part.rows_a], part.squared], dim=1)
        smallest[part.rows_a] = candidates.topk(k + 1, dim=1, largest=False).values
    return smallest[:, -1]
