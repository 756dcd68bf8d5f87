"""Triton kernel of `varcli.kernels.attention` for one step over a cache: from the product of q, k and v to what is seen.

A program takes one head of some queries. It sees what earlier steps left in the cache, then the step's own keys, which it
normalises as it reads them, as no program can wait for what another one writes; those of its own tokens it leaves in the
cache for later steps.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from varcli.kernels.attention_triton import see
from varcli.kernels.qk_triton import SHORTEST

# tokens of a program, at most, and of the keys that it looks at together: three programs a multiprocessor of an H100; not timed
_QUERIES, _KEYS = 64, 64


@triton.jit
def _unit_length(x):
    return x * (1 / tl.maximum(tl.sqrt(tl.sum(x * x, axis=1)), SHORTEST))[:, None]


@triton.jit
def _own_pair(
    qkv_ptr, v_bias, tokens, length, columns,
    HEADS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Keys and values of these tokens of the step, as the cache keeps them; what comes after the last must not be seen."""
    dtype = qkv_ptr.dtype.element_ty
    inside = (tokens < length)[:, None] & (columns < WIDTH)[None, :]
    at = tokens[:, None] * (3 * HEADS * WIDTH) + columns[None, :]
    k = tl.load(qkv_ptr + at + HEADS * WIDTH, mask=inside, other=0).to(tl.float32)
    v = tl.load(qkv_ptr + at + 2 * HEADS * WIDTH, mask=inside, other=0).to(tl.float32) + v_bias[None, :]
    return _unit_length(k).to(dtype), v.to(dtype)


@triton.jit
def _cached_piece(
    q, k_ptr, v_ptr, start, before, columns, token_stride, peak, total, out,
    SCALE: tl.constexpr, WIDTH: tl.constexpr, KEYS: tl.constexpr, IS_CUT: tl.constexpr,
):  # fmt: skip
    keys = start + tl.arange(0, KEYS)
    inside = columns[None, :] < WIDTH
    if IS_CUT:
        inside &= (keys < before)[:, None]
    at = keys[:, None] * token_stride + columns[None, :]
    k = tl.load(k_ptr + at, mask=inside, other=0)
    v = tl.load(v_ptr + at, mask=inside, other=0)
    return see(q, k, v, (keys < before)[None, :], peak, total, out, SCALE, IS_CUT)


@triton.jit(do_not_specialize=["length", "before"])  # else steps differ, and each kind takes a second to compile
def _varcli_attend_step(
    qkv_ptr, q_bias_ptr, v_bias_ptr, log_scale_ptr, k_ptr, v_ptr, out_ptr,
    sample_stride, head_stride, token_stride, length, before, cap,
    SCALE: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    head, sample = tl.program_id(1), tl.program_id(2).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    tokens = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    inside = (tokens < length)[:, None] & (columns < WIDTH)[None, :]
    qkv_ptr += sample * length * 3 * HEADS * WIDTH + head * WIDTH
    k_ptr += sample * sample_stride + head * head_stride
    v_ptr += sample * sample_stride + head * head_stride
    q_bias = tl.load(q_bias_ptr + head * WIDTH + columns, mask=columns < WIDTH, other=0).to(tl.float32)
    v_bias = tl.load(v_bias_ptr + head * WIDTH + columns, mask=columns < WIDTH, other=0).to(tl.float32)
    scale = tl.exp(tl.minimum(tl.load(log_scale_ptr + head).to(tl.float32), cap))
    at = tokens[:, None] * (3 * HEADS * WIDTH) + columns[None, :]
    q = tl.load(qkv_ptr + at, mask=inside, other=0).to(tl.float32) + q_bias[None, :]
    q = (_unit_length(q) * scale).to(qkv_ptr.dtype.element_ty)

    kept_k, kept_v = _own_pair(qkv_ptr, v_bias, tokens, length, columns, HEADS, WIDTH)
    at = (before + tokens)[:, None] * token_stride + columns[None, :]
    tl.store(k_ptr + at, kept_k, mask=inside)
    tl.store(v_ptr + at, kept_v, mask=inside)

    peak = tl.full((QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    out = tl.zeros((QUERIES, BLOCK), tl.float32)
    whole = before // KEYS * KEYS
    for start in range(0, whole, KEYS):
        peak, total, out = _cached_piece(
            q, k_ptr, v_ptr, start, before, columns, token_stride, peak, total, out, SCALE, WIDTH, KEYS, False
        )
    for start in range(whole, before, KEYS):
        peak, total, out = _cached_piece(
            q, k_ptr, v_ptr, start, before, columns, token_stride, peak, total, out, SCALE, WIDTH, KEYS, True
        )
    for start in range(0, length, KEYS):
        keys = start + tl.arange(0, KEYS)
        k, v = _own_pair(qkv_ptr, v_bias, keys, length, columns, HEADS, WIDTH)
        peak, total, out = see(q, k, v, (keys < length)[None, :], peak, total, out, SCALE, True)
    at = ((sample * length + tokens) * HEADS + head)[:, None] * WIDTH + columns[None, :]
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
    out = qkv_BlC.new_empty(batch, length, heads, width)
    queries = min(_QUERIES, max(16, triton.next_power_of_2(length)))
    with torch.cuda.device_of(qkv_BlC):
        _varcli_attend_step[(triton.cdiv(length, queries), heads, batch)](
            qkv_BlC.contiguous(),
            q_bias_C.contiguous(),
            v_bias_C.contiguous(),
            log_scale.contiguous(),
            k_BnLd,
            v_BnLd,
            out,
            *k_BnLd.stride()[:3],
            length,
            k_BnLd.shape[2] - length,
            cap,
            SCALE=scale,
            HEADS=heads,
            WIDTH=width,
            BLOCK=max(16, triton.next_power_of_2(width)),
            QUERIES=queries,
            KEYS=_KEYS,
            num_warps=4,
            num_stages=3,
        )
    return out
