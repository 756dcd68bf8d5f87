"""Triton kernels of `varcli.kernels.attention` for one step over a cache: from the product of q, k and v to what is seen.

A program takes one head of some queries, normalises them and sees the cache. A step whose queries are one program's has its
keys, of unit length, and its values put into the cache by that program; those of longer steps are put there by a kernel
before, as each of their programs would have to normalise them all: 150 in place of 154 ms for 64 images of depth 16 on an
H100 (examples/benchmarks/sampling.md).

No score is above the length of its query, which is a head's own: softmax takes its exponentials as they are, and looks for
the highest score, as in FlashAttention-2 (arXiv:2307.08691), only where a head's queries are too long for that.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from varcli.kernels.attention_triton import LOG2_E
from varcli.kernels.few_rows_triton import early_launch
from varcli.kernels.qk_triton import SHORTEST

_TOKENS = 32  # of a program that fills the cache
# of a program that sees it, at most, and the keys that it looks at together: the fastest for all steps of 256 px on an H100
_QUERIES, _KEYS = 64, 64
# scores to base 2, whose exponentials, and sums of these, are float32 numbers
_LONGEST: tl.constexpr = tl.constexpr(100.0)


@triton.jit
def _unit_length(x):
    return x * (1 / tl.maximum(tl.sqrt(tl.sum(x * x, axis=1)), SHORTEST))[:, None]


@triton.jit
def _load_keys(qkv_ptr, v_bias_ptr, rows, inside, columns, head, HEADS: tl.constexpr, WIDTH: tl.constexpr):
    """The unit-length keys and the values of some tokens, in the dtype of their product."""
    at = (rows * 3 * HEADS + head)[:, None] * WIDTH + columns[None, :]
    k = tl.load(qkv_ptr + at + HEADS * WIDTH, mask=inside, other=0)
    v = tl.load(qkv_ptr + at + 2 * HEADS * WIDTH, mask=inside, other=0).to(tl.float32)
    v_bias = tl.load(v_bias_ptr + head * WIDTH + columns, mask=columns < WIDTH, other=0).to(tl.float32)
    return _unit_length(k.to(tl.float32)).to(k.dtype), (v + v_bias[None, :]).to(k.dtype)


@triton.jit(do_not_specialize=["length", "before"])  # else steps differ, and each kind takes a second to compile
def _varcli_keep_step(
    qkv_ptr, v_bias_ptr, k_ptr, v_ptr, sample_stride, head_stride, token_stride, length, before,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    head, sample = tl.program_id(0), tl.program_id(2).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    tokens = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    inside = (tokens < length)[:, None] & (columns < WIDTH)[None, :]
    k, v = _load_keys(qkv_ptr, v_bias_ptr, sample * length + tokens, inside, columns, head, HEADS, WIDTH)
    at = sample * sample_stride + head * head_stride + (before + tokens)[:, None] * token_stride + columns[None, :]
    tl.store(k_ptr + at, k, mask=inside)
    tl.store(v_ptr + at, v, mask=inside)


@triton.jit
def _see(q, k, v, is_key, peak, total, out, IS_BOUNDED: tl.constexpr):
    """Let queries see some keys, scores to base 2: what is subtracted from these, sum of weights, and of weighted values."""
    scores = tl.dot(q, k.T, input_precision="ieee")
    if IS_BOUNDED:  # where nothing is subtracted
        weights = tl.where(is_key[None, :], tl.exp2(scores), 0.0)
    else:
        scores = tl.where(is_key[None, :], scores, float("-inf"))
        higher = tl.maximum(peak, tl.max(scores, axis=1))
        weights = tl.exp2(scores - higher[:, None])
        faded = tl.exp2(peak - higher)
        peak, total, out = higher, total * faded, out * faded[:, None]
    return peak, total + tl.sum(weights, axis=1), tl.dot(weights.to(v.dtype), v, out, input_precision="ieee")


@triton.jit
def _see_kept(
    q, k_ptr, v_ptr, first, last, columns, token_stride, peak, total, out,
    IS_BOUNDED: tl.constexpr, WIDTH: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Do as `_see` with the cache's tokens from `first` to before `last`."""
    for start in range(first, last, KEYS):
        keys = start + tl.arange(0, KEYS)
        inside = (keys < last)[:, None] & (columns < WIDTH)[None, :]
        at = keys[:, None] * token_stride + columns[None, :]
        k = tl.load(k_ptr + at, mask=inside, other=0)
        v = tl.load(v_ptr + at, mask=inside, other=0)
        peak, total, out = _see(q, k, v, keys < last, peak, total, out, IS_BOUNDED)
    return peak, total, out


@triton.jit(do_not_specialize=["length", "before"])
def _varcli_attend_step(
    qkv_ptr, q_bias_ptr, v_bias_ptr, log_scale_ptr, k_ptr, v_ptr, out_ptr,
    sample_stride, head_stride, token_stride, length, before, cap,
    KEEPS: tl.constexpr, IS_EARLY: tl.constexpr, SCALE: tl.constexpr,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    if IS_EARLY:
        gdc_launch_dependents()
        gdc_wait()
    head, sample = tl.program_id(1), tl.program_id(2).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    tokens = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    inside = (tokens < length)[:, None] & (columns < WIDTH)[None, :]
    rows = sample * length + tokens
    k_ptr += sample * sample_stride + head * head_stride
    v_ptr += sample * sample_stride + head * head_stride
    at = (rows * 3 * HEADS + head)[:, None] * WIDTH + columns[None, :]
    q_bias = tl.load(q_bias_ptr + head * WIDTH + columns, mask=columns < WIDTH, other=0).to(tl.float32)
    scale = tl.exp(tl.minimum(tl.load(log_scale_ptr + head).to(tl.float32), cap)) * (SCALE * LOG2_E)
    q = tl.load(qkv_ptr + at, mask=inside, other=0)
    q = (_unit_length(q.to(tl.float32) + q_bias[None, :]) * scale).to(q.dtype)
    num_kept = before if KEEPS else before + length
    is_bounded = scale <= _LONGEST
    if q.dtype == tl.float16:  # whose weights are at most 65,504
        is_bounded = False
    num_bounded = tl.where(is_bounded, num_kept, 0)
    peak = tl.zeros((QUERIES,), tl.float32) + tl.where(is_bounded, 0.0, float("-inf"))
    total = tl.zeros((QUERIES,), tl.float32)
    out = tl.zeros((QUERIES, BLOCK), tl.float32)
    # one of these loops is empty
    peak, total, out = _see_kept(
        q, k_ptr, v_ptr, 0, num_bounded, columns, token_stride, peak, total, out, True, WIDTH, KEYS
    )  # fmt: skip
    peak, total, out = _see_kept(
        q, k_ptr, v_ptr, num_bounded, num_kept, columns, token_stride, peak, total, out, False, WIDTH, KEYS
    )  # fmt: skip
    if KEEPS:
        k, v = _load_keys(qkv_ptr, v_bias_ptr, rows, inside, columns, head, HEADS, WIDTH)
        at = (before + tokens)[:, None] * token_stride + columns[None, :]
        tl.store(k_ptr + at, k, mask=inside)
        tl.store(v_ptr + at, v, mask=inside)
        peak, total, out = _see(q, k, v, tokens < length, peak, total, out, False)
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
    is_early: bool = False,
) -> Tensor:
    """Return what the queries of a step see, (B, l, n, d), and write its keys and values to the last l places of the cache.

    Keys and values: of equal strides, channels dense. is_early: launched as `few_rows_triton` says.
    """
    assert k_BnLd.stride() == v_BnLd.stride() and k_BnLd.stride(3) == 1, (k_BnLd.stride(), v_BnLd.stride())
    assert qkv_BlC.dtype == k_BnLd.dtype == v_BnLd.dtype, (qkv_BlC.dtype, k_BnLd.dtype, v_BnLd.dtype)
    (batch, length, channels), heads = qkv_BlC.shape, log_scale.numel()
    width = channels // (3 * heads)
    before, strides = k_BnLd.shape[2] - length, k_BnLd.stride()[:3]
    qkv_BlC, out = qkv_BlC.contiguous(), qkv_BlC.new_empty(batch, length, heads, width)
    queries = min(_QUERIES, max(16, triton.next_power_of_2(length)))
    is_one_program = length <= queries
    sizes = {"HEADS": heads, "WIDTH": width, "BLOCK": max(16, triton.next_power_of_2(width))}
    with torch.cuda.device_of(qkv_BlC):
        if not is_one_program:
            _varcli_keep_step[(heads, triton.cdiv(length, _TOKENS), batch)](
                qkv_BlC,
                v_bias_C.contiguous(),
                k_BnLd,
                v_BnLd,
                *strides,
                length,
                before,
                TOKENS=_TOKENS,
                num_warps=4,
                **sizes,
            )
        _varcli_attend_step[(triton.cdiv(length, queries), heads, batch)](
            qkv_BlC,
            q_bias_C.contiguous(),
            v_bias_C.contiguous(),
            log_scale.contiguous(),
            k_BnLd,
            v_BnLd,
            out,
            *strides,
            length,
            before,
            cap,
            KEEPS=is_one_program,
            IS_EARLY=is_early,
            SCALE=scale,
            QUERIES=queries,
            KEYS=_KEYS,
            num_warps=4,
            num_stages=3,
            **early_launch(is_early),
            **sizes,
        )
    return out
