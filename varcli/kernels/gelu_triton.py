"""Triton kernels of `varcli.kernels.gelu`; the backward one makes the bias's gradient on the way.

For products in FP8 a program has whole rows, and stores them in FP8 too, or alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from varcli.kernels.fp8_triton import row_scale, row_warps
from varcli.kernels.outputs import rows_like

_COLUMNS = 1024  # of a program, 8 neighbouring ones a thread: 16 bytes of bfloat16
_TILE_ROWS = 2  # at once, so that more loads are on their way
_FORWARD_ROWS = 16  # of a program, which share a bias
_BACKWARD_ROWS = 128  # of a program: the sums it leaves behind are then 1 % of what it reads
_NUM_WARPS = 4
_FEW_ROWS = 8192  # fewer whole rows are spread over the device one a program, for the shortest time


@triton.jit
def gelu(x):
    """The tanh form, float32."""
    # 0.5 * (1 + tanh(u)) is sigmoid(2 * u), and 1.59... is twice the root of 2 / pi
    return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))


@triton.jit
def _varcli_gelu_forward(
    before_ptr, bias_ptr, result_ptr, rounded_ptr, scale_ptr,
    num_rows,
    KEEPS: tl.constexpr, ROUNDS: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, TILE_ROWS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    first = tl.program_id(0) * ROWS  # the axis that may be long
    bias = tl.load(bias_ptr + columns, mask=columns < WIDTH, other=0).to(tl.float32)
    for start in range(first, min(first + ROWS, num_rows), TILE_ROWS):
        rows = start + tl.arange(0, TILE_ROWS)
        at = rows.to(tl.int64)[:, None] * WIDTH + columns[None, :]
        inside = (rows < num_rows)[:, None] & (columns < WIDTH)[None, :]
        x = tl.load(before_ptr + at, mask=inside, other=0).to(tl.float32) + bias[None, :]
        result = gelu(x).to(before_ptr.dtype.element_ty)
        if KEEPS:
            tl.store(result_ptr + at, result, mask=inside)
        if ROUNDS:
            result = tl.where(inside, result.to(tl.float32), 0.0)
            scale = row_scale(tl.max(tl.abs(result), axis=1))
            tl.store(scale_ptr + rows, scale, mask=rows < num_rows)
            tl.store(rounded_ptr + at, (result / scale[:, None]).to(rounded_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _varcli_gelu_backward(
    grad_ptr, before_ptr, bias_ptr, grad_before_ptr, sums_ptr, rounded_ptr, scale_ptr,
    num_rows,
    ROUNDS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, TILE_ROWS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    first = tl.program_id(0) * ROWS  # the axis that may be long
    bias = tl.load(bias_ptr + columns, mask=columns < WIDTH, other=0).to(tl.float32)
    sums = tl.zeros((TILE_ROWS, BLOCK), tl.float32)
    for start in range(first, min(first + ROWS, num_rows), TILE_ROWS):
        rows = start + tl.arange(0, TILE_ROWS)
        at = rows.to(tl.int64)[:, None] * WIDTH + columns[None, :]
        inside = (rows < num_rows)[:, None] & (columns < WIDTH)[None, :]
        grad = tl.load(grad_ptr + at, mask=inside, other=0).to(tl.float32)
        x = tl.load(before_ptr + at, mask=inside, other=0).to(tl.float32) + bias[None, :]
        share = tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
        slope = 1.5957691216057308 * (1 + 0.134145 * x * x)
        grad = grad * (share + x * share * (1 - share) * slope)
        sums += grad
        grad = grad.to(grad_before_ptr.dtype.element_ty)
        tl.store(grad_before_ptr + at, grad, mask=inside)
        if ROUNDS:
            grad = tl.where(inside, grad.to(tl.float32), 0.0)
            scale = row_scale(tl.max(tl.abs(grad), axis=1))
            tl.store(scale_ptr + rows, scale, mask=rows < num_rows)
            tl.store(rounded_ptr + at, (grad / scale[:, None]).to(rounded_ptr.dtype.element_ty), mask=inside)
    tl.store(sums_ptr + tl.program_id(0) * WIDTH + columns, tl.sum(sums, axis=0), mask=columns < WIDTH)


def launch_forward(
    before: Tensor, bias_H: Tensor, rounds: bool = False, keeps: bool = True
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return gelu(before + bias), (..., H); if it `rounds`, also its rows in FP8, (M, H), and their scales, (M, 1).

    Without `keeps` there are these rows alone.
    """
    before = before.contiguous()
    width = before.shape[-1]
    num_rows = before.numel() // width
    result = torch.empty_like(before) if keeps else None
    rounded, scales = rows_like(before) if rounds else (None, None)
    tile = _tile(width, rounds)
    rows = 1 if rounds and num_rows <= _FEW_ROWS else _FORWARD_ROWS
    with torch.cuda.device_of(before):
        _varcli_gelu_forward[(triton.cdiv(num_rows, rows), triton.cdiv(width, tile["BLOCK"]))](
            before,
            bias_H.contiguous(),
            result,
            rounded,
            scales,
            num_rows,
            KEEPS=keeps,
            ROUNDS=rounds,
            WIDTH=width,
            ROWS=rows,
            **tile,
        )
    return result, rounded, scales


def launch_backward(
    grad: Tensor, before: Tensor, bias_H: Tensor, rounds: bool = False
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return the gradients to what came in, (..., H), and to the bias, float32 (H,); if it `rounds`, also the former's rows."""
    grad, before = grad.contiguous(), before.contiguous()
    width = before.shape[-1]
    num_rows = before.numel() // width
    grad_before = torch.empty_like(before)
    rounded, scales = rows_like(before) if rounds else (None, None)
    chunks = triton.cdiv(num_rows, _BACKWARD_ROWS)
    sums = torch.empty(chunks, width, dtype=torch.float32, device=before.device)
    tile = _tile(width, rounds)
    with torch.cuda.device_of(before):
        _varcli_gelu_backward[(chunks, triton.cdiv(width, tile["BLOCK"]))](
            grad,
            before,
            bias_H.contiguous(),
            grad_before,
            sums,
            rounded,
            scales,
            num_rows,
            ROUNDS=rounds,
            WIDTH=width,
            ROWS=_BACKWARD_ROWS,
            **tile,
        )
    return grad_before, sums.sum(dim=0), rounded, scales


def _tile(width: int, rounds: bool) -> dict[str, int]:
    """What a program works on at once: a part of two rows, or the whole of one."""
    block = triton.next_power_of_2(width)
    if not rounds:
        return {"BLOCK": min(_COLUMNS, block), "TILE_ROWS": _TILE_ROWS, "num_warps": _NUM_WARPS}
    return {"BLOCK": block, "TILE_ROWS": 1, "num_warps": row_warps(block, most=32)}
