"""Triton kernels of `varcli.kernels.gelu`; the backward one makes the bias's gradient on the way."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_COLUMNS = 1024  # of a program, 8 neighbouring ones a thread: 16 bytes of bfloat16
_TILE_ROWS = 2  # at once, so that more loads are on their way
_FORWARD_ROWS = 16  # of a program, which share a bias
_BACKWARD_ROWS = 128  # of a program: the sums it leaves behind are then 1 % of what it reads
_NUM_WARPS = 4


@triton.jit
def _varcli_gelu_forward(
    before_ptr, bias_ptr, result_ptr,
    num_rows,
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
        # 0.5 * (1 + tanh(u)) is sigmoid(2 * u), and 1.59... is twice the root of 2 / pi
        result = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
        tl.store(result_ptr + at, result.to(result_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _varcli_gelu_backward(
    grad_ptr, before_ptr, bias_ptr, grad_before_ptr, sums_ptr,
    num_rows,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, TILE_ROWS: tl.constexpr, ROWS: tl.constexpr,
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
        tl.store(grad_before_ptr + at, grad.to(grad_before_ptr.dtype.element_ty), mask=inside)
    tl.store(sums_ptr + tl.program_id(0) * WIDTH + columns, tl.sum(sums, axis=0), mask=columns < WIDTH)


def launch_forward(before: Tensor, bias_H: Tensor) -> Tensor:
    """Return gelu(before + bias), (..., H)."""
    before = before.contiguous()
    width = before.shape[-1]
    num_rows = before.numel() // width
    result = torch.empty_like(before)
    block = min(_COLUMNS, triton.next_power_of_2(width))
    with torch.cuda.device_of(before):
        _varcli_gelu_forward[(triton.cdiv(num_rows, _FORWARD_ROWS), triton.cdiv(width, block))](
            before,
            bias_H.contiguous(),
            result,
            num_rows,
            WIDTH=width,
            BLOCK=block,
            TILE_ROWS=_TILE_ROWS,
            ROWS=_FORWARD_ROWS,
            num_warps=_NUM_WARPS,
        )
    return result


def launch_backward(grad: Tensor, before: Tensor, bias_H: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients to what came in, (..., H), and to the bias, float32 (H,)."""
    grad, before = grad.contiguous(), before.contiguous()
    width = before.shape[-1]
    num_rows = before.numel() // width
    grad_before = torch.empty_like(before)
    chunks = triton.cdiv(num_rows, _BACKWARD_ROWS)
    sums = torch.empty(chunks, width, dtype=torch.float32, device=before.device)
    block = min(_COLUMNS, triton.next_power_of_2(width))
    with torch.cuda.device_of(before):
        _varcli_gelu_backward[(chunks, triton.cdiv(width, block))](
            grad,
            before,
            bias_H.contiguous(),
            grad_before,
            sums,
            num_rows,
            WIDTH=width,
            BLOCK=block,
            TILE_ROWS=_TILE_ROWS,
            ROWS=_BACKWARD_ROWS,
            num_warps=_NUM_WARPS,
        )
    return grad_before, sums.sum(dim=0)
