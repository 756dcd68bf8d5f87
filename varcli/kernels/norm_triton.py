"""Triton kernels of `varcli.kernels.norm`: one pass over the activations forward, one backward.

A program walks over some rows of one sample, so that the sample's gate, scale and shift stay in registers, and sums for
their gradients too. A thread holds 8 neighbouring channels: 16 bytes of bfloat16 at a time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from varcli.kernels.few_rows_triton import early_launch
from varcli.kernels.fp8_triton import row_scale, row_warps

_FORWARD_ROWS = 8  # a program: few, as nothing but the three vectors is shared by them
_FEW_ROWS = 8192  # of all samples: fewer are spread over the device one a program, for the shortest time
_BACKWARD_ROWS = 64  # a program: the sums it leaves behind are then 2 % of what it reads


@triton.jit(do_not_specialize=["length"])  # else steps differ, and each kind takes half a second to compile
def _varcli_norm_forward(
    stream_ptr, branch_ptr, bias_ptr, gate_ptr, scale_ptr, shift_ptr,
    out_ptr, normed_ptr, mean_ptr, inverse_ptr, rounded_ptr, row_scale_ptr,
    gate_stride, scale_stride, shift_stride, length, eps,
    HAS_BRANCH: tl.constexpr, HAS_BIAS: tl.constexpr, KEEPS: tl.constexpr, ROUNDS: tl.constexpr, IS_EARLY: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    if IS_EARLY:
        gdc_launch_dependents()
        gdc_wait()
    sample = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * ROWS
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    scale = 1 + tl.load(scale_ptr + sample * scale_stride + columns, mask=inside, other=0).to(tl.float32)
    shift = tl.load(shift_ptr + sample * shift_stride + columns, mask=inside, other=0).to(tl.float32)
    if HAS_BRANCH:
        gate = tl.load(gate_ptr + sample * gate_stride + columns, mask=inside, other=0).to(tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + columns, mask=inside, other=0).to(tl.float32)
    for row in range(first, min(first + ROWS, length)):
        token = sample * length + row
        x = tl.load(stream_ptr + token * WIDTH + columns, mask=inside, other=0)
        if HAS_BRANCH:
            branch = tl.load(branch_ptr + token * WIDTH + columns, mask=inside, other=0).to(tl.float32)
            if HAS_BIAS:
                branch += bias
            # rounded as it is stored, so that the backward pass sees what was normalised
            x = (x.to(tl.float32) + gate * branch).to(out_ptr.dtype.element_ty)
            tl.store(out_ptr + token * WIDTH + columns, x, mask=inside)
        x = x.to(tl.float32)
        mean = tl.sum(x, axis=0) / WIDTH
        centred = tl.where(inside, x - mean, 0.0)
        inverse = 1 / tl.sqrt(tl.sum(centred * centred, axis=0) / WIDTH + eps)
        normed = (centred * inverse * scale + shift).to(out_ptr.dtype.element_ty)
        if KEEPS:
            tl.store(mean_ptr + token, mean)
            tl.store(inverse_ptr + token, inverse)
            tl.store(normed_ptr + token * WIDTH + columns, normed, mask=inside)
        if ROUNDS:
            normed = tl.where(inside, normed.to(tl.float32), 0.0)
            size = row_scale(tl.max(tl.abs(normed), axis=0))
            tl.store(row_scale_ptr + token, size)
            rounded = (normed / size).to(rounded_ptr.dtype.element_ty)
            tl.store(rounded_ptr + token * WIDTH + columns, rounded, mask=inside)


@triton.jit
def _varcli_norm_backward(
    grad_normed_ptr, grad_out_ptr, out_ptr, branch_ptr, bias_ptr, gate_ptr, scale_ptr, mean_ptr, inverse_ptr,
    grad_stream_ptr, grad_branch_ptr, sums_ptr,
    gate_stride, scale_stride, length,
    HAS_BRANCH: tl.constexpr, HAS_BIAS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * ROWS
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    scale = 1 + tl.load(scale_ptr + sample * scale_stride + columns, mask=inside, other=0).to(tl.float32)
    sum_scale = tl.zeros((BLOCK,), tl.float32)
    sum_shift = tl.zeros((BLOCK,), tl.float32)
    if HAS_BRANCH:
        gate = tl.load(gate_ptr + sample * gate_stride + columns, mask=inside, other=0).to(tl.float32)
        sum_gate = tl.zeros((BLOCK,), tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + columns, mask=inside, other=0).to(tl.float32)
        sum_bias = tl.zeros((BLOCK,), tl.float32)
    for row in range(first, min(first + ROWS, length)):
        token = sample * length + row
        at = token * WIDTH + columns
        grad = tl.load(grad_normed_ptr + at, mask=inside, other=0).to(tl.float32)
        x = tl.load(out_ptr + at, mask=inside, other=0).to(tl.float32)
        if HAS_BRANCH:
            grad_out = tl.load(grad_out_ptr + at, mask=inside, other=0).to(tl.float32)
            branch = tl.load(branch_ptr + at, mask=inside, other=0).to(tl.float32)
            if HAS_BIAS:
                branch += bias
        mean = tl.load(mean_ptr + token)
        inverse = tl.load(inverse_ptr + token)
        unit = tl.where(inside, (x - mean) * inverse, 0.0)
        sum_scale += grad * unit
        sum_shift += grad
        grad = grad * scale
        along = tl.sum(grad * unit, axis=0) / WIDTH
        level = tl.sum(grad, axis=0) / WIDTH
        grad = (grad - level - unit * along) * inverse
        if HAS_BRANCH:
            grad += grad_out
            sum_gate += grad * branch
            grad_branch = grad * gate
            if HAS_BIAS:
                sum_bias += grad_branch
            tl.store(grad_branch_ptr + at, grad_branch.to(grad_branch_ptr.dtype.element_ty), mask=inside)
        tl.store(grad_stream_ptr + at, grad.to(grad_stream_ptr.dtype.element_ty), mask=inside)
    kinds: tl.constexpr = 4 if HAS_BIAS else 3 if HAS_BRANCH else 2
    sums_ptr += (sample * tl.num_programs(0) + tl.program_id(0)) * kinds * WIDTH
    tl.store(sums_ptr + columns, sum_scale, mask=inside)
    tl.store(sums_ptr + WIDTH + columns, sum_shift, mask=inside)
    if HAS_BRANCH:
        tl.store(sums_ptr + 2 * WIDTH + columns, sum_gate, mask=inside)
    if HAS_BIAS:
        tl.store(sums_ptr + 3 * WIDTH + columns, sum_bias, mask=inside)


def launch_forward(
    stream_BLC: Tensor,
    branch_BLC: Tensor | None,
    bias_C: Tensor | None,
    gate_B1C: Tensor | None,
    scale_B1C: Tensor,
    shift_B1C: Tensor,
    eps: float,
    rounded_NC: Tensor | None = None,
    row_scales_N1: Tensor | None = None,
    keeps: bool = True,
    is_early: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Return the stream with the gated branch added, its modulated norm, and mean and inverse deviation (B, L), float32.

    Without a branch the first is the stream itself. bias_C: of the branch, where it is not in it yet. rounded_NC,
    row_scales_N1: where the norm's rows are to be written in FP8, and their scales; without `keeps` nothing else is of it.
    is_early: launched as `few_rows_triton` says.
    """
    stream_BLC = stream_BLC.contiguous()
    batch, length, width = stream_BLC.shape
    normed = mean = inverse = None
    if keeps:
        normed = torch.empty_like(stream_BLC)
        mean, inverse = (torch.empty(batch, length, dtype=torch.float32, device=stream_BLC.device) for _ in range(2))
    scale_B1C, shift_B1C = _dense_rows(scale_B1C), _dense_rows(shift_B1C)
    out = stream_BLC
    if branch_BLC is not None:
        out, branch_BLC, gate_B1C = torch.empty_like(stream_BLC), branch_BLC.contiguous(), _dense_rows(gate_B1C)
    block, rows = triton.next_power_of_2(width), _FORWARD_ROWS if batch * length > _FEW_ROWS else 1
    with torch.cuda.device_of(out):
        _varcli_norm_forward[(triton.cdiv(length, rows), batch)](
            stream_BLC,
            branch_BLC,
            bias_C,
            gate_B1C,
            scale_B1C,
            shift_B1C,
            out,
            normed,
            mean,
            inverse,
            rounded_NC,
            row_scales_N1,
            0 if gate_B1C is None else gate_B1C.stride(0),
            scale_B1C.stride(0),
            shift_B1C.stride(0),
            length,
            eps,
            HAS_BRANCH=branch_BLC is not None,
            HAS_BIAS=bias_C is not None,
            KEEPS=keeps,
            ROUNDS=rounded_NC is not None,
            IS_EARLY=is_early,
            WIDTH=width,
            BLOCK=block,
            ROWS=rows,
            num_warps=row_warps(block),
            **early_launch(is_early),
        )
    return out, normed, mean, inverse


def launch_backward(
    grad_normed_BLC: Tensor,
    grad_out_BLC: Tensor | None,
    out_BLC: Tensor,
    branch_BLC: Tensor | None,
    bias_C: Tensor | None,
    gate_B1C: Tensor | None,
    scale_B1C: Tensor,
    mean_BL: Tensor,
    inverse_BL: Tensor,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return gradients to stream and branch, and the sums over tokens (B, 2 to 4, C), float32: scale, shift, gate, bias."""
    grad_normed_BLC, out_BLC, scale_B1C = grad_normed_BLC.contiguous(), out_BLC.contiguous(), _dense_rows(scale_B1C)
    batch, length, width = out_BLC.shape
    grad_stream, grad_branch = torch.empty_like(out_BLC), None
    if branch_BLC is not None:
        grad_out_BLC, branch_BLC, gate_B1C = grad_out_BLC.contiguous(), branch_BLC.contiguous(), _dense_rows(gate_B1C)
        grad_branch = torch.empty_like(branch_BLC)
    chunks = triton.cdiv(length, _BACKWARD_ROWS)
    kinds = 2 + (branch_BLC is not None) + (bias_C is not None)
    sums = torch.empty(batch, chunks, kinds, width, dtype=torch.float32, device=out_BLC.device)
    block = triton.next_power_of_2(width)
    with torch.cuda.device_of(out_BLC):
        _varcli_norm_backward[(chunks, batch)](
            grad_normed_BLC,
            grad_out_BLC,
            out_BLC,
            branch_BLC,
            bias_C,
            gate_B1C,
            scale_B1C,
            mean_BL.contiguous(),
            inverse_BL.contiguous(),
            grad_stream,
            grad_branch,
            sums,
            0 if gate_B1C is None else gate_B1C.stride(0),
            scale_B1C.stride(0),
            length,
            HAS_BRANCH=branch_BLC is not None,
            HAS_BIAS=bias_C is not None,
            WIDTH=width,
            BLOCK=block,
            ROWS=_BACKWARD_ROWS,
            num_warps=row_warps(block),
        )
    return grad_stream, grad_branch, sums.sum(dim=1)


def _dense_rows(vector_B1C: Tensor) -> Tensor:
    """Rows whose channels are neighbours; samples may lie apart, as in a part of the modulation."""
    return vector_B1C if vector_B1C.stride(-1) == 1 else vector_B1C.contiguous()
