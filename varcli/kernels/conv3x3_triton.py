"""The Triton kernel of `varcli.kernels.conv3x3`: a convolution as one matrix product whose rows are gathered on the way.

A program computes all output channels of some neighbouring positions, as two blocks of columns, a power of two wide each:
what a position sees is read from memory once, and no column is computed in vain.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from varcli.kernels.conv3x3 import DEPTH, POSITIONS, WIDE

_NUM_WARPS, _NUM_STAGES = 4, 5  # the fastest of five tried on an H100, 554 TFLOP/s from 160 channels to 160 at 256 px


@triton.jit
def _finish(
    values, columns, skip_ptr, bias_ptr, out_ptr, sums_ptr, rows,
    HAS_BIAS: tl.constexpr, HAS_SKIP: tl.constexpr, OUT: tl.constexpr,
):  # fmt: skip
    """Add bias and skip path to a block of columns, store it rounded, and leave the sums of what was stored."""
    at = rows[:, None] * OUT + columns[None, :]
    if HAS_BIAS:
        values += tl.load(bias_ptr + columns).to(tl.float32)[None, :]
    if HAS_SKIP:
        values += tl.load(skip_ptr + at).to(tl.float32)
    rounded = values.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + at, rounded)
    values = rounded.to(tl.float32)
    tl.store(sums_ptr + columns, tl.sum(values, axis=0))
    tl.store(sums_ptr + OUT + columns, tl.sum(values * values, axis=0))


@triton.jit
def _varcli_conv3x3(
    x_ptr, weight_ptr, bias_ptr, skip_ptr, out_ptr, sums_ptr, height, width,
    HAS_BIAS: tl.constexpr, HAS_SKIP: tl.constexpr,
    IN: tl.constexpr, OUT: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(1).to(tl.int64)
    length = height * width
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # positions of one sample: their number is a multiple of ROWS
    row = rows // width
    column = rows % width
    x_ptr += sample * length * IN
    channels = tl.arange(0, DEPTH)
    wide_columns = tl.arange(0, WIDE)
    narrow_columns = WIDE + tl.arange(0, OUT - WIDE)
    wide = tl.zeros((ROWS, WIDE), tl.float32)
    narrow = tl.zeros((ROWS, OUT - WIDE), tl.float32)
    pieces: tl.constexpr = IN // DEPTH
    for k in range(9 * pieces):
        tap = k // pieces
        down = tap // 3 - 1
        right = tap % 3 - 1
        inside = (row + down >= 0) & (row + down < height) & (column + right >= 0) & (column + right < width)
        at = (rows + down * width + right) * IN + (k % pieces) * DEPTH
        seen = tl.load(x_ptr + at[:, None] + channels[None, :], mask=inside[:, None], other=0.0)
        weight_at = (k * DEPTH + channels)[:, None] * OUT
        wide = tl.dot(seen, tl.load(weight_ptr + weight_at + wide_columns[None, :]), wide)
        narrow = tl.dot(seen, tl.load(weight_ptr + weight_at + narrow_columns[None, :]), narrow)
    out_ptr += sample * length * OUT
    if HAS_SKIP:
        skip_ptr += sample * length * OUT
    sums_ptr += (sample * tl.num_programs(0) + tl.program_id(0)) * 2 * OUT
    _finish(wide, wide_columns, skip_ptr, bias_ptr, out_ptr, sums_ptr, rows, HAS_BIAS, HAS_SKIP, OUT)
    _finish(narrow, narrow_columns, skip_ptr, bias_ptr, out_ptr, sums_ptr, rows, HAS_BIAS, HAS_SKIP, OUT)


def launch_conv3x3(
    tokens_BNC: Tensor, weight_KO: Tensor, bias_O: Tensor | None, skip_BNO: Tensor | None, height: int, width: int
) -> tuple[Tensor, Tensor]:
    """Return the tokens (B, N, O) of the convolved map, and partial sums (B, N / POSITIONS, 2, O), float32.

    weight_KO: row by row the taps, and in each the input channels.
    """
    batch, length, channels = tokens_BNC.shape
    outputs = weight_KO.shape[1]
    out = torch.empty(batch, length, outputs, dtype=tokens_BNC.dtype, device=tokens_BNC.device)
    sums = torch.empty(batch, length // POSITIONS, 2, outputs, dtype=torch.float32, device=tokens_BNC.device)
    with torch.cuda.device_of(out):
        _varcli_conv3x3[(length // POSITIONS, batch)](
            tokens_BNC.contiguous(),
            weight_KO.contiguous(),
            None if bias_O is None else bias_O.contiguous(),
            None if skip_BNO is None else skip_BNO.contiguous(),
            out,
            sums,
            height,
            width,
            HAS_BIAS=bias_O is not None,
            HAS_SKIP=skip_BNO is not None,
            IN=channels,
            OUT=outputs,
            WIDE=WIDE,
            ROWS=POSITIONS,
            DEPTH=DEPTH,
            num_warps=_NUM_WARPS,
            num_stages=_NUM_STAGES,
        )
    return out, sums
