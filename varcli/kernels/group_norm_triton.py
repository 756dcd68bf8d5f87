"""Triton kernels of `varcli.kernels.group_norm`, over maps whose channels are last.

A program computes a tile of neighbouring positions and channels, as many channels as the largest power of two in their number
allows: none is masked out, and each position's part is 64 bytes or more where widths are the released ones. What belongs to
a channel is loaded once a program.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from varcli.kernels.group_norm import ROWS

_MOST_CHANNELS = 64  # of a tile
_TILE = 4096  # values: 32 a thread, so that 64 bytes a thread are on their way at once
_NUM_WARPS = 4


@triton.jit
def _varcli_channel_sums(
    x_ptr, branch_ptr, bias_ptr, out_ptr, sums_ptr, length,
    HAS_BRANCH: tl.constexpr, HAS_BIAS: tl.constexpr, IS_STORED: tl.constexpr,
    PHASE_WIDTH: tl.constexpr, MARGIN_WIDTH: tl.constexpr,
    WIDTH: tl.constexpr, CHANNELS: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(2).to(tl.int64)
    first = tl.program_id(1) * ROWS
    columns = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    # PHASE_WIDTH, MARGIN_WIDTH: columns of a phase of which this is the map, and of the map to which this adds a margin
    start = sample * length * WIDTH
    read_start = start
    if PHASE_WIDTH > 0:  # phases have a row and a column more than their part of the map
        read_start = sample * (length // (4 * PHASE_WIDTH) + 1) * (PHASE_WIDTH + 1) * 4 * WIDTH
    if MARGIN_WIDTH > 0:
        height = length // (MARGIN_WIDTH + 1) - 1
        read_start = sample * height * MARGIN_WIDTH * WIDTH
    if HAS_BIAS:
        bias = tl.load(bias_ptr + columns).to(tl.float32)[None, :]
    total = tl.zeros((TILE, CHANNELS), tl.float32)
    squares = tl.zeros((TILE, CHANNELS), tl.float32)
    for row in range(first, min(first + ROWS, length), TILE):
        rows = (row + tl.arange(0, TILE))[:, None]
        inside = rows < length
        at = rows * WIDTH + columns[None, :]
        read_at = at
        is_read = inside
        if PHASE_WIDTH > 0:
            i = rows // (2 * PHASE_WIDTH)
            j = rows % (2 * PHASE_WIDTH)
            place = ((i + 1) // 2) * (PHASE_WIDTH + 1) + (j + 1) // 2
            read_at = (place * 4 + (i % 2) * 2 + j % 2) * WIDTH + columns[None, :]
        if MARGIN_WIDTH > 0:
            i = rows // (MARGIN_WIDTH + 1)
            j = rows % (MARGIN_WIDTH + 1)
            is_read = (i < height) & (j < MARGIN_WIDTH)
            read_at = (i * MARGIN_WIDTH + j) * WIDTH + columns[None, :]
        x = tl.load(x_ptr + read_start + read_at, mask=is_read, other=0).to(tl.float32)
        if HAS_BRANCH:
            x += tl.load(branch_ptr + read_start + read_at, mask=is_read, other=0).to(tl.float32)
        if HAS_BIAS:
            x = tl.where(is_read, x + bias, 0.0)
        if IS_STORED:
            # summed as it is stored, which is what will be normalised
            rounded = x.to(out_ptr.dtype.element_ty)
            tl.store(out_ptr + start + at, rounded, mask=inside)
            x = rounded.to(tl.float32)
        total += x
        squares += x * x
    sums_ptr += (sample * tl.num_programs(1) + tl.program_id(1)) * 2 * WIDTH
    tl.store(sums_ptr + columns, tl.sum(total, axis=0))
    tl.store(sums_ptr + WIDTH + columns, tl.sum(squares, axis=0))


@triton.jit
def _varcli_scale_and_shift(
    x_ptr, scale_ptr, shift_ptr, out_ptr, length,
    IS_ACTIVATED: tl.constexpr, WIDTH: tl.constexpr, CHANNELS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(2).to(tl.int64)
    columns = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    rows = (tl.program_id(1) * TILE + tl.arange(0, TILE))[:, None]
    inside = rows < length
    start = sample * length * WIDTH
    at = rows * WIDTH + columns[None, :]
    scale = tl.load(scale_ptr + sample * WIDTH + columns)[None, :]
    shift = tl.load(shift_ptr + sample * WIDTH + columns)[None, :]
    x = tl.load(x_ptr + start + at, mask=inside, other=0).to(tl.float32) * scale + shift
    if IS_ACTIVATED:
        x = x / (1 + tl.exp(-x))
    tl.store(out_ptr + start + at, x.to(out_ptr.dtype.element_ty), mask=inside)


def launch_sums(tokens_BNC: Tensor, bias_C: Tensor | None) -> Tensor:
    """Return partial sums (B, ceil(N / ROWS), 2, C), float32: of tokens + bias, and of their squares."""
    return _launch(tokens_BNC, None, bias_C, None, *tokens_BNC.shape[1:])


def launch_residual(tokens_BNC: Tensor, branch_BNC: Tensor | None, bias_C: Tensor) -> tuple[Tensor, Tensor]:
    """Return tokens + branch + bias, and the partial sums of that."""
    batch, length, width = tokens_BNC.shape
    out = torch.empty(batch, length, width, dtype=tokens_BNC.dtype, device=tokens_BNC.device)
    return out, _launch(tokens_BNC, branch_BNC, bias_C, out, length, width)


def launch_margin(tokens_BNC: Tensor, branch_BNC: Tensor, bias_C: Tensor, height: int, width: int) -> Tensor:
    """Return tokens + branch + bias as those of a map with a row and a column of zeros after the others."""
    batch, _, channels = tokens_BNC.shape
    length = (height + 1) * (width + 1)
    out = torch.empty(batch, length, channels, dtype=tokens_BNC.dtype, device=tokens_BNC.device)
    _launch(tokens_BNC, branch_BNC, bias_C, out, length, channels, margin_width=width)
    return out


def launch_phases(tokens: Tensor, bias_C: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Return the tokens (B, 4 * height * width, C) of a map from those of its four phases, and their partial sums."""
    batch, _, channels = tokens.shape
    out = torch.empty(batch, 4 * height * width, channels // 4, dtype=tokens.dtype, device=tokens.device)
    return out, _launch(tokens, None, bias_C, out, *out.shape[1:], phase_width=width)


def _launch(
    tokens: Tensor,
    branch: Tensor | None,
    bias: Tensor | None,
    out: Tensor | None,
    length: int,
    width: int,
    phase_width: int = 0,
    margin_width: int = 0,
) -> Tensor:
    batch, chunks = len(tokens), triton.cdiv(length, ROWS)
    channels, tile = _tile(width)
    sums = torch.empty(batch, chunks, 2, width, dtype=torch.float32, device=tokens.device)
    with torch.cuda.device_of(tokens):
        _varcli_channel_sums[(width // channels, chunks, batch)](
            tokens.contiguous(),
            None if branch is None else branch.contiguous(),
            None if bias is None else bias.contiguous(),
            out,
            sums,
            length,
            HAS_BRANCH=branch is not None,
            HAS_BIAS=bias is not None,
            IS_STORED=out is not None,
            PHASE_WIDTH=phase_width,
            MARGIN_WIDTH=margin_width,
            WIDTH=width,
            CHANNELS=channels,
            TILE=tile,
            ROWS=ROWS,
            num_warps=_NUM_WARPS,
        )
    return sums


def launch_scale(tokens_BNC: Tensor, scale_BC: Tensor, shift_BC: Tensor, is_activated: bool) -> Tensor:
    """Return tokens * scale + shift, or the SiLU of that, in the tokens' dtype."""
    tokens_BNC = tokens_BNC.contiguous()
    batch, length, width = tokens_BNC.shape
    channels, tile = _tile(width)
    out = torch.empty_like(tokens_BNC)
    with torch.cuda.device_of(out):
        _varcli_scale_and_shift[(width // channels, triton.cdiv(length, tile), batch)](
            tokens_BNC,
            scale_BC.contiguous(),
            shift_BC.contiguous(),
            out,
            length,
            IS_ACTIVATED=is_activated,
            WIDTH=width,
            CHANNELS=channels,
            TILE=tile,
            num_warps=_NUM_WARPS,
        )
    return out


def _tile(width: int) -> tuple[int, int]:
    """Channels and positions of a tile: powers of two, of which the first divides `width` and the second ROWS."""
    channels = min(width & -width, _MOST_CHANNELS)
    return channels, min(_TILE // channels, ROWS)
