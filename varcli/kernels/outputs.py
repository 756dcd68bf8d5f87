"""What an operator of this room computes in, and room for what it returns: on every device, and where only shapes count."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def wide_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype to compute in: float32, or float64 for tensors of that."""
    return torch.promote_types(tensor.dtype, torch.float32)


def dense_like(tensor: Tensor) -> Tensor:
    """Room for a tensor of this shape and dtype, contiguous however this one lies."""
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def rows_like(x: Tensor) -> tuple[Tensor, Tensor]:
    """Room for the rows of x (..., K) in FP8 (e4m3), (M, K), and for their scales, (M, 1) float32."""
    num_rows = math.prod(x.shape[:-1])
    rounded = x.new_empty((num_rows, x.shape[-1]), dtype=torch.float8_e4m3fn)
    return rounded, x.new_empty((num_rows, 1), dtype=torch.float32)


def stored(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a copy, rounded to `dtype`, laid out as a kernel writes it: also where one sample leaves a stride open."""
    return torch.empty(values.shape, dtype=dtype, device=values.device).copy_(values)
