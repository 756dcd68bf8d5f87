"""Exp(1) noise that is a pure function of what it is for, so that an image does not depend on its batch or device.

Each number is -log(u), u a hash of (seed, class, index, step, stream, position, code): splitmix64's finaliser in
64-bit integers, which wrap the same everywhere. Source of the mixer: Steele et al., 2014, doi:10.1145/2660193.2660195.
On a GPU varcli.kernels.draw_triton makes the same numbers where they are used.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

_Ints = TypeVar("_Ints", Tensor, np.ndarray)  # of int64


def _signed(value: int) -> int:
    value &= 2**64 - 1
    return value - 2**64 if value >= 2**63 else value


_GOLDEN, _MIX_1, _MIX_2 = (_signed(c) for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
STREAM_CODES, STREAM_SMOOTH = 0, 1  # what noise is for
_BITS = 23  # of u: with the half that keeps it inside (0, 1) float32 holds it exactly, so u never rounds to 1


class Noise(Protocol):
    """Where a generator takes its randomness from."""

    def __call__(self, step: int, stream: int, length: int, vocab_size: int) -> Tensor:
        """Exp(1) numbers (B, length, vocab_size), float32; stream: STREAM_CODES or STREAM_SMOOTH."""


def image_keys(seed: int, classes: Sequence[int], indices: Sequence[int]) -> Tensor:
    """One number an image, int64 (B,) on the CPU, that depends on all three and on nothing else."""
    keys = np.zeros(len(classes), dtype=np.int64)  # whose sums and products wrap as torch's, and begin faster
    for part in ([seed] * len(classes), classes, indices):
        keys = _mix(keys + _GOLDEN + np.array([_signed(value) for value in part], dtype=np.int64))
    return torch.from_numpy(keys)


def salt(step: int, stream: int) -> int:
    """What is added to an image's key before it is mixed twice, to the key of a step and stream: signed, of 64 bits."""
    return _signed(_GOLDEN * (2 * step + stream + 1))


class KeyedNoise:
    """Noise of a batch of images, each known by (seed, class, index)."""

    def __init__(self, seed: int, classes: Sequence[int], indices: Sequence[int], device: torch.device) -> None:
        self.keys_B = image_keys(seed, classes, indices).to(device)

    def __call__(self, step: int, stream: int, length: int, vocab_size: int) -> Tensor:
        """See `Noise`."""
        keys = _mix(_mix(self.keys_B + salt(step, stream)))
        counter = torch.arange(1, length * vocab_size + 1, dtype=torch.int64, device=keys.device)
        bits = _mix(keys.unsqueeze(1) + counter * _GOLDEN)
        return exponential(bits).view(-1, length, vocab_size)


def exponential(bits: Tensor) -> Tensor:
    """Turn random int64 into Exp(1) numbers, float32, from 6e-8 to 16.7: never 0, which a draw divides by."""
    return -((_shift(bits, 64 - _BITS).float() + 0.5) / 2**_BITS).log()


def _shift(value: _Ints, bits: int) -> _Ints:
    """Shift right, filling with zeros: that of int64 repeats the sign."""
    return (value >> bits) & (2 ** (64 - bits) - 1)


def _mix(value: _Ints) -> _Ints:
    value = (value ^ _shift(value, 30)) * _MIX_1
    value = (value ^ _shift(value, 27)) * _MIX_2
    return value ^ _shift(value, 31)
