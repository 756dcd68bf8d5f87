"""Rows rounded to FP8 as `varcli.kernels.fp8.round_rows` does: a pass of their own, and what other kernels share for it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from varcli.kernels.outputs import rows_like

_CHANNELS_A_WARP = 256  # 8 a thread: 16 bytes of bfloat16


@triton.jit
def row_scale(largest):
    """Return the scale of a row whose largest entry is this."""
    return tl.maximum(largest, 1e-30) / 448.0


@triton.jit
def _varcli_round_rows(x_ptr, rounded_ptr, scale_ptr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * WIDTH + columns, mask=columns < WIDTH, other=0).to(tl.float32)
    scale = row_scale(tl.max(tl.abs(x), axis=0))
    tl.store(scale_ptr + row, scale)
    rounded = (x / scale).to(rounded_ptr.dtype.element_ty)
    tl.store(rounded_ptr + row * WIDTH + columns, rounded, mask=columns < WIDTH)


def row_warps(block: int, most: int = 16) -> int:
    """Return the warps of a program that holds one row of `block` channels."""
    return min(most, max(1, block // _CHANNELS_A_WARP))


def launch_round(x_MK: Tensor) -> tuple[Tensor, Tensor]:
    """Return each row over its scale in FP8, (M, K), and the scales, (M, 1)."""
    x_MK = x_MK.contiguous()
    rounded, scales = rows_like(x_MK)
    block = triton.next_power_of_2(x_MK.shape[1])
    with torch.cuda.device_of(x_MK):
        _varcli_round_rows[(len(x_MK),)](
            x_MK,
            rounded,
            scales,
            WIDTH=x_MK.shape[1],
            BLOCK=block,
            num_warps=row_warps(block),
        )
    return rounded, scales
