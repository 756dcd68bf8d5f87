"""The Triton kernel of `varcli.kernels.gelu`: the backward pass, with the bias's gradient on the way."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_COLUMNS = 1024  # a program, 8 neighbouring ones a thread: 16 bytes of bfloat16
_TILE_ROWS = 2  # at once, so that more loads are on their way
_ROWS = 128  # a program: the sums it leaves behind are then 1 % of what it reads
_NUM_WARPS = 4


@triton.jit
def _varcli_gelu_backward(
    grad_ptr, before_ptr, bias_ptr, grad_before_ptr, sums_ptr,
    num_rows,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, TILE_ROWS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    first = tl.program_id(1) * ROWS
    bias = tl.load(bias_ptr + columns, mask=columns < WIDTH, other=0).to(tl.float32)
    sums = tl.zeros((TILE_ROWS, BLOCK), tl.float32)
    for start in range(first, min(first + ROWS, num_rows), TILE_ROWS):
        rows = start + tl.arange(0, TILE_ROWS)
        at = rows.to(tl.int64)[:, None] * WIDTH + columns[None, :]
        inside = (rows < num_rows)[:, None] & (columns < WIDTH)[None, :]
        grad = tl.load(grad_ptr + at, mask=inside, other=0).to(tl.float32)
        x = tl.load(before_ptr + at, mask=inside, other=0).to(tl.float32) + bias[None, :]
        # 0.5 * (1 + tanh(u)) is sigmoid(2 * u)
        share = tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
        slope = 1.5957691216057308 * (1 + 3 * 0.044715 * x * x)
        grad = grad * (share + x * share * (1 - share) * slope)
        sums += grad
        tl.store(grad_before_ptr + at, grad.to(grad_before_ptr.dtype.element_ty), mask=inside)
    tl.store(sums_ptr + tl.program_id(1) * WIDTH + columns, tl.sum(sums, axis=0), mask=columns < WIDTH)


def launch_backward(grad: Tensor, before: Tensor, bias_H: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients to what came in, (..., H), and to the bias, float32 (H,)."""
    grad, before = grad.contiguous(), before.contiguous()
    width = before.shape[-1]
    num_rows = before.numel() // width
    grad_before = torch.empty_like(before)
    chunks = triton.cdiv(num_rows, _ROWS)
    sums = torch.empty(chunks, width, dtype=torch.float32, device=before.device)
    block = min(_COLUMNS, triton.next_power_of_2(width))
    _varcli_gelu_backward[(triton.cdiv(width, block), chunks)](
        grad,
        before,
        bias_H.contiguous(),
        grad_before,
        sums,
        num_rows,
        WIDTH=width,
        BLOCK=block,
        TILE_ROWS=_TILE_ROWS,
        ROWS=_ROWS,
        num_warps=_NUM_WARPS,
    )
    return grad_before, sums.sum(dim=0)
