"""Triton kernels of `varcli.kernels.attention` for one step over a cache: from the product of q, k and v to what is seen.

One leaves the step's keys, of unit length, and its values in the cache. A program of the other takes one head of some queries,
normalises them and sees the cache. One kernel for both had to normalise the step's keys in each program that sees them: 150
in place of 154 ms for 64 images of depth 16 on an H100 (examples/benchmarks/sampling.md).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from varcli.kernels.attention_triton import see_piece
from varcli.kernels.qk_triton import SHORTEST

_TOKENS = 32  # of a program that fills the cache
# of a program that sees it, at most, and the keys that it looks at together: as the fastest that sees all steps
_QUERIES, _KEYS = 64, 64


@triton.jit
def _unit_length(x):
    return x * (1 / tl.maximum(tl.sqrt(tl.sum(x * x, axis=1)), SHORTEST))[:, None]


@triton.jit(do_not_specialize=["length", "before"])  # else steps differ, and each kind takes a second to compile
def _varcli_keep_step(
    qkv_ptr, v_bias_ptr, k_ptr, v_ptr, sample_stride, head_stride, token_stride, length, before,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    head, sample = tl.program_id(0), tl.program_id(2).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    tokens = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    inside = (tokens < length)[:, None] & (columns < WIDTH)[None, :]
    at = ((sample * length + tokens) * 3 * HEADS + head)[:, None] * WIDTH + columns[None, :]
    k = tl.load(qkv_ptr + at + HEADS * WIDTH, mask=inside, other=0).to(tl.float32)
    v = tl.load(qkv_ptr + at + 2 * HEADS * WIDTH, mask=inside, other=0).to(tl.float32)
    v_bias = tl.load(v_bias_ptr + head * WIDTH + columns, mask=columns < WIDTH, other=0).to(tl.float32)
    at = sample * sample_stride + head * head_stride + (before + tokens)[:, None] * token_stride + columns[None, :]
    tl.store(k_ptr + at, _unit_length(k).to(k_ptr.dtype.element_ty), mask=inside)
    tl.store(v_ptr + at, (v + v_bias[None, :]).to(v_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["length", "end"])
def _varcli_attend_step(
    qkv_ptr, q_bias_ptr, log_scale_ptr, k_ptr, v_ptr, out_ptr,
    sample_stride, head_stride, token_stride, length, end, cap,
    SCALE: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    head, sample = tl.program_id(1), tl.program_id(2).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    tokens = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    inside = (tokens < length)[:, None] & (columns < WIDTH)[None, :]
    k_ptr += sample * sample_stride + head * head_stride
    v_ptr += sample * sample_stride + head * head_stride
    rows = sample * length + tokens
    at = (rows * 3 * HEADS + head)[:, None] * WIDTH + columns[None, :]
    q_bias = tl.load(q_bias_ptr + head * WIDTH + columns, mask=columns < WIDTH, other=0).to(tl.float32)
    scale = tl.exp(tl.minimum(tl.load(log_scale_ptr + head).to(tl.float32), cap))
    q = tl.load(qkv_ptr + at, mask=inside, other=0).to(tl.float32) + q_bias[None, :]
    q = (_unit_length(q) * scale).to(qkv_ptr.dtype.element_ty)
    peak = tl.full((QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    out = tl.zeros((QUERIES, BLOCK), tl.float32)
    ends = tokens * 0 + end
    whole = end // KEYS * KEYS
    for start in range(0, whole, KEYS):
        peak, total, out = see_piece(
            q, k_ptr, v_ptr, start, ends, columns, peak, total, out, end, token_stride, SCALE, WIDTH, KEYS, False
        )  # fmt: skip
    for start in range(whole, end, KEYS):
        peak, total, out = see_piece(
            q, k_ptr, v_ptr, start, ends, columns, peak, total, out, end, token_stride, SCALE, WIDTH, KEYS, True
        )  # fmt: skip
    at = (rows * HEADS + head)[:, None] * WIDTH + columns[None, :]
    tl.store(out_ptr + at, (out / total[:, None]).to(out_ptr.dtype.element_ty), mask=inside)


def launch_step(
    qkv_BlC: Tensor,
    q_bias_C: Tensor,
    v_bias_C: Tensor,
    log_scale: Tensor,
    cap: float,
    k_BnLd: Tensor,
    v_BnLd: Tensor,
    scale: float,
) -> Tensor:
    """Return what the queries of a step see, (B, l, n, d), and write its keys and values to the last l places of the cache.

    Keys and values: of equal strides, channels dense.
    """
    assert k_BnLd.stride() == v_BnLd.stride() and k_BnLd.stride(3) == 1, (k_BnLd.stride(), v_BnLd.stride())
    assert qkv_BlC.dtype == k_BnLd.dtype == v_BnLd.dtype, (qkv_BlC.dtype, k_BnLd.dtype, v_BnLd.dtype)
    (batch, length, channels), heads = qkv_BlC.shape, log_scale.numel()
    width = channels // (3 * heads)
    end, strides = k_BnLd.shape[2], k_BnLd.stride()[:3]
    qkv_BlC, out = qkv_BlC.contiguous(), qkv_BlC.new_empty(batch, length, heads, width)
    queries = min(_QUERIES, max(16, triton.next_power_of_2(length)))
    sizes = {"HEADS": heads, "WIDTH": width, "BLOCK": max(16, triton.next_power_of_2(width))}
    with torch.cuda.device_of(qkv_BlC):
        _varcli_keep_step[(heads, triton.cdiv(length, _TOKENS), batch)](
            qkv_BlC,
            v_bias_C.contiguous(),
            k_BnLd,
            v_BnLd,
            *strides,
            length,
            end - length,
            TOKENS=_TOKENS,
            num_warps=4,
            **sizes,
        )
        _varcli_attend_step[(triton.cdiv(length, queries), heads, batch)](
            qkv_BlC,
            q_bias_C.contiguous(),
            log_scale.contiguous(),
            k_BnLd,
            v_BnLd,
            out,
            *strides,
            length,
            end,
            cap,
            SCALE=scale,
            QUERIES=queries,
            KEYS=_KEYS,
            num_warps=4,
            num_stages=3,
            **sizes,
        )
    return out
