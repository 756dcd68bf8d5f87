"""Triton kernels of `varcli.kernels.qk`: queries and keys of unit length, one pass forward, one backward.

A program takes one head of some neighbouring tokens of a sample: rows of d channels, so that a length is a sum within a
warp. Programs of neighbouring heads run side by side and read neighbouring memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_FORWARD_TILE = 2048  # elements of q, of k and of v a program: 16 a thread
_BACKWARD_TILE = 1024  # 8 a thread
_BACKWARD_TILES = 8  # one after the other: the sums left behind are then 1 % of what is read
_NUM_WARPS = 4
# a vector shorter than 1e-12 was not brought to unit length, so its gradient has no part taken away along it
SHORTEST: tl.constexpr = tl.constexpr(1e-12)
LONGEST_INVERSE: tl.constexpr = tl.constexpr(0.999e12)


@triton.jit
def _varcli_qk_forward(
    qkv_ptr, q_bias_ptr, v_bias_ptr, log_scale_ptr, q_ptr, k_ptr, v_ptr, q_inverse_ptr, k_inverse_ptr,
    kv_sample_stride, kv_token_stride, kv_head_stride, length, cap,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr, HAS_INVERSES: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    tokens = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    columns = tl.arange(0, BLOCK)
    inside = (tokens < length)[:, None] & (columns < WIDTH)[None, :]
    sample = tl.program_id(2).to(tl.int64)
    rows = sample * length + tokens
    at = (rows * HEADS + head)[:, None] * WIDTH + columns[None, :]
    kv_at = (sample * kv_sample_stride + tokens * kv_token_stride + head * kv_head_stride)[:, None] + columns[None, :]
    source = (rows * 3 * HEADS + head)[:, None] * WIDTH + columns[None, :]
    channels = head * WIDTH + columns
    q_bias = tl.load(q_bias_ptr + channels, mask=columns < WIDTH, other=0).to(tl.float32)
    v_bias = tl.load(v_bias_ptr + channels, mask=columns < WIDTH, other=0).to(tl.float32)
    q = tl.load(qkv_ptr + source, mask=inside, other=0).to(tl.float32)
    k = tl.load(qkv_ptr + source + HEADS * WIDTH, mask=inside, other=0).to(tl.float32)
    v = tl.load(qkv_ptr + source + 2 * HEADS * WIDTH, mask=inside, other=0).to(tl.float32)
    q += q_bias[None, :]
    v += v_bias[None, :]
    q_inverse = 1 / tl.maximum(tl.sqrt(tl.sum(q * q, axis=1)), SHORTEST)
    k_inverse = 1 / tl.maximum(tl.sqrt(tl.sum(k * k, axis=1)), SHORTEST)
    scale = tl.exp(tl.minimum(tl.load(log_scale_ptr + head).to(tl.float32), cap))
    q *= (q_inverse * scale)[:, None]
    k *= k_inverse[:, None]
    tl.store(q_ptr + at, q.to(q_ptr.dtype.element_ty), mask=inside)
    tl.store(k_ptr + kv_at, k.to(k_ptr.dtype.element_ty), mask=inside)
    tl.store(v_ptr + kv_at, v.to(v_ptr.dtype.element_ty), mask=inside)
    if HAS_INVERSES:
        tl.store(q_inverse_ptr + rows * HEADS + head, q_inverse, mask=tokens < length)
        tl.store(k_inverse_ptr + rows * HEADS + head, k_inverse, mask=tokens < length)


@triton.jit
def _gather(
    pieces, sample, tokens, columns, head, first,
    STARTS: tl.constexpr, ENDS: tl.constexpr,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Sum of the pieces' rows at these tokens. Piece i holds the tokens from STARTS[i] on and before ENDS[i]."""
    total = tl.zeros((TOKENS, BLOCK), tl.float32)
    for step in tl.static_range(len(ENDS)):
        if (first < ENDS[step]) & (first + TOKENS > STARTS[step]):  # most pieces are short, and have no row here
            inside = (tokens >= STARTS[step]) & (tokens < ENDS[step])
            rows = sample * (ENDS[step] - STARTS[step]) + tokens - STARTS[step]
            at = (rows * HEADS + head)[:, None] * WIDTH + columns[None, :]
            mask = inside[:, None] & (columns < WIDTH)[None, :]
            total += tl.load(pieces[step] + at, mask=mask, other=0).to(tl.float32)
    return total


@triton.jit
def _varcli_qk_backward(
    grad_q, grad_k, grad_v, q_ptr, k_ptr, q_inverse_ptr, k_inverse_ptr, log_scale_ptr,
    grad_qkv_ptr, bias_sums_ptr, scale_sums_ptr,
    length, cap,
    STARTS: tl.constexpr, ZEROS: tl.constexpr, ENDS: tl.constexpr,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    # a head of q, of k or of v, as they lie in qkv: three kinds of programs with few registers each
    slot = tl.program_id(0)
    head = slot % HEADS
    sample = tl.program_id(2).to(tl.int64)
    part = sample * tl.num_programs(1) + tl.program_id(1)
    columns = tl.arange(0, BLOCK)
    channels = head * WIDTH + columns
    bias_sums_ptr += part * 2 * HEADS * WIDTH
    begin = tl.program_id(1) * TILES * TOKENS
    end = min(begin + TILES * TOKENS, length)
    if slot < HEADS:
        log_scale = tl.load(log_scale_ptr + head).to(tl.float32)
        scale = tl.exp(tl.minimum(log_scale, cap))
        bias_sums = tl.zeros((TOKENS, BLOCK), tl.float32)
        scale_sums = tl.zeros((TOKENS,), tl.float32)
        for first in range(begin, end, TOKENS):
            tokens = first + tl.arange(0, TOKENS)
            inside = (tokens < length)[:, None] & (columns < WIDTH)[None, :]
            rows = sample * length + tokens
            at = (rows * HEADS + head)[:, None] * WIDTH + columns[None, :]
            inverse = tl.load(q_inverse_ptr + rows * HEADS + head, mask=tokens < length, other=0)
            q = tl.load(q_ptr + at, mask=inside, other=0).to(tl.float32)
            grad = _gather(grad_q, sample, tokens, columns, head, first, STARTS, ENDS, HEADS, WIDTH, BLOCK, TOKENS)
            along = tl.sum(grad * q, axis=1)
            scale_sums += along
            along = tl.where(inverse < LONGEST_INVERSE, along / (scale * scale), 0.0)
            grad = (grad - q * along[:, None]) * (inverse * scale)[:, None]
            bias_sums += grad
            at = (rows * 3 * HEADS + slot)[:, None] * WIDTH + columns[None, :]
            tl.store(grad_qkv_ptr + at, grad.to(grad_qkv_ptr.dtype.element_ty), mask=inside)
        tl.store(bias_sums_ptr + channels, tl.sum(bias_sums, axis=0), mask=columns < WIDTH)
        # above its cap the temperature has no gradient
        total = tl.where(log_scale <= cap, tl.sum(scale_sums, axis=0), 0.0)
        tl.store(scale_sums_ptr + part * HEADS + head, total)
    elif slot < 2 * HEADS:
        for first in range(begin, end, TOKENS):
            tokens = first + tl.arange(0, TOKENS)
            inside = (tokens < length)[:, None] & (columns < WIDTH)[None, :]
            rows = sample * length + tokens
            at = (rows * HEADS + head)[:, None] * WIDTH + columns[None, :]
            inverse = tl.load(k_inverse_ptr + rows * HEADS + head, mask=tokens < length, other=0)
            k = tl.load(k_ptr + at, mask=inside, other=0).to(tl.float32)
            grad = _gather(grad_k, sample, tokens, columns, head, first, ZEROS, ENDS, HEADS, WIDTH, BLOCK, TOKENS)
            along = tl.where(inverse < LONGEST_INVERSE, tl.sum(grad * k, axis=1), 0.0)
            grad = (grad - k * along[:, None]) * inverse[:, None]
            at = (rows * 3 * HEADS + slot)[:, None] * WIDTH + columns[None, :]
            tl.store(grad_qkv_ptr + at, grad.to(grad_qkv_ptr.dtype.element_ty), mask=inside)
    else:
        bias_sums = tl.zeros((TOKENS, BLOCK), tl.float32)
        for first in range(begin, end, TOKENS):
            tokens = first + tl.arange(0, TOKENS)
            inside = (tokens < length)[:, None] & (columns < WIDTH)[None, :]
            rows = sample * length + tokens
            grad = _gather(grad_v, sample, tokens, columns, head, first, ZEROS, ENDS, HEADS, WIDTH, BLOCK, TOKENS)
            bias_sums += grad
            at = (rows * 3 * HEADS + slot)[:, None] * WIDTH + columns[None, :]
            tl.store(grad_qkv_ptr + at, grad.to(grad_qkv_ptr.dtype.element_ty), mask=inside)
        tl.store(bias_sums_ptr + HEADS * WIDTH + channels, tl.sum(bias_sums, axis=0), mask=columns < WIDTH)


def launch_forward(
    qkv_BLC: Tensor, q_bias_C: Tensor, v_bias_C: Tensor, log_scale: Tensor, cap: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return q, k, v as (B, L, n, d), and the inverse lengths (B, L, n) of q and k before, float32."""
    (batch, length, channels), heads = qkv_BLC.shape, log_scale.numel()
    q, k, v = (qkv_BLC.new_empty(batch, length, heads, channels // (3 * heads)) for _ in range(3))
    q_inverse, k_inverse = (qkv_BLC.new_empty(batch, length, heads, dtype=torch.float32) for _ in range(2))
    _launch_forward(qkv_BLC, q_bias_C, v_bias_C, log_scale, cap, q, k, v, (q_inverse, k_inverse))
    return q, k, v, q_inverse, k_inverse


def launch_into(
    qkv_BlC: Tensor,
    q_bias_C: Tensor,
    v_bias_C: Tensor,
    log_scale: Tensor,
    cap: float,
    k_Bnld: Tensor,
    v_Bnld: Tensor,
) -> Tensor:
    """Return q as (B, l, n, d), and write k and v to where there is room for them: of equal strides, channels dense."""
    (batch, length, channels), heads = qkv_BlC.shape, log_scale.numel()
    assert k_Bnld.stride() == v_Bnld.stride() and k_Bnld.stride(3) == 1, (k_Bnld.stride(), v_Bnld.stride())
    q = qkv_BlC.new_empty(batch, length, heads, channels // (3 * heads))
    _launch_forward(qkv_BlC, q_bias_C, v_bias_C, log_scale, cap, q, k_Bnld.transpose(1, 2), v_Bnld.transpose(1, 2))
    return q


def _launch_forward(
    qkv_BLC: Tensor,
    q_bias_C: Tensor,
    v_bias_C: Tensor,
    log_scale: Tensor,
    cap: float,
    q_BLnd: Tensor,
    k_BLnd: Tensor,
    v_BLnd: Tensor,
    inverses: tuple[Tensor, Tensor] | None = None,
) -> None:
    batch, length, heads, width = q_BLnd.shape
    block = triton.next_power_of_2(width)
    tokens = max(1, _FORWARD_TILE // block)
    with torch.cuda.device_of(qkv_BLC):
        _varcli_qk_forward[(heads, triton.cdiv(length, tokens), batch)](
            qkv_BLC.contiguous(),
            q_bias_C.contiguous(),
            v_bias_C.contiguous(),
            log_scale.contiguous(),
            q_BLnd,
            k_BLnd,
            v_BLnd,
            *(inverses or (None, None)),
            *k_BLnd.stride()[:3],
            length,
            cap,
            HEADS=heads,
            WIDTH=width,
            BLOCK=block,
            TOKENS=tokens,
            HAS_INVERSES=inverses is not None,
            num_warps=_NUM_WARPS,
        )


def launch_backward(
    grads_q: list[Tensor],
    grads_k: list[Tensor],
    grads_v: list[Tensor],
    q_BLnd: Tensor,
    k_BLnd: Tensor,
    q_inverse_BLn: Tensor,
    k_inverse_BLn: Tensor,
    log_scale: Tensor,
    cap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradient to qkv (B, L, 3C), and summed in float32 those to both biases (2, C) and to log_scale (n,).

    grads_q: one a step, (B, l, n, d). grads_k, grads_v: one a step, (B, L', n, d) of all tokens up to the step's end.
    """
    batch, length, heads, width = q_BLnd.shape
    ends = tuple(int(piece.shape[1]) for piece in grads_k)
    block = triton.next_power_of_2(width)
    tokens = max(1, _BACKWARD_TILE // block)
    chunks = triton.cdiv(length, tokens * _BACKWARD_TILES)
    grad_qkv = q_BLnd.new_empty(batch, length, 3 * heads * width)
    bias_sums = torch.empty(batch, chunks, 2, heads * width, dtype=torch.float32, device=q_BLnd.device)
    scale_sums = torch.empty(batch, chunks, heads, dtype=torch.float32, device=q_BLnd.device)
    with torch.cuda.device_of(q_BLnd):
        _varcli_qk_backward[(3 * heads, chunks, batch)](
            tuple(piece.contiguous() for piece in grads_q),
            tuple(piece.contiguous() for piece in grads_k),
            tuple(piece.contiguous() for piece in grads_v),
            q_BLnd.contiguous(),
            k_BLnd.contiguous(),
            q_inverse_BLn.contiguous(),
            k_inverse_BLn.contiguous(),
            log_scale.contiguous(),
            grad_qkv,
            bias_sums,
            scale_sums,
            length,
            cap,
            STARTS=(0, *ends[:-1]),
            ZEROS=(0,) * len(ends),
            ENDS=ends,
            HEADS=heads,
            WIDTH=width,
            BLOCK=block,
            TOKENS=tokens,
            TILES=_BACKWARD_TILES,
            num_warps=_NUM_WARPS,
        )
    return grad_qkv, bias_sums.sum(dim=(0, 1)), scale_sums.sum(dim=(0, 1))
