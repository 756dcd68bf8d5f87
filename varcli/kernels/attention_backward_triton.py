"""Triton kernels of `varcli.kernels.attention`, backward: from what was seen to the product of queries, keys and values.

Probabilities are computed twice, once for queries and once for keys and values. A program then holds whole gradients of its
tokens, and what normalising them takes away is taken away before they are stored.

Source: the backward pass of FlashAttention-2 (arXiv:2307.08691).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from varcli.kernels.attention_triton import LOG2_E, Tiling, cut_tiles, end_of, pick, sizes_of, start_of
from varcli.kernels.qk_triton import LONGEST_INVERSE

# the fastest of several on an H100 (examples/benchmarks/training_rates.md): registers as few as let four programs share a
# multiprocessor gained for queries, while for keys and values any limit lost
QUERY_TILES = Tiling(64, 32, 4, 4, 128)
KEY_TILES = Tiling(64, 64, 4, 3)


@triton.jit
def _query_piece(
    q, grad_out, level, mean, k_ptr, v_ptr, start, ends, columns, token_stride, grad,
    SCALE: tl.constexpr, END: tl.constexpr, WIDTH: tl.constexpr, KEYS: tl.constexpr, IS_CUT: tl.constexpr,
):  # fmt: skip
    """Add to the gradient of queries what comes over the keys from `start` on."""
    keys = start + tl.arange(0, KEYS)
    at = keys[:, None] * token_stride + columns[None, :]
    inside = columns[None, :] < WIDTH
    if IS_CUT:
        inside &= (keys < END)[:, None]
    k = tl.load(k_ptr + at, mask=inside, other=0)
    v = tl.load(v_ptr + at, mask=inside, other=0)
    scores = tl.dot(q, k.T, input_precision="ieee") * (SCALE * LOG2_E)
    if IS_CUT:
        scores = tl.where(keys[None, :] < ends[:, None], scores, float("-inf"))
    weights = tl.exp2(scores - level[:, None])
    grad_scores = weights * (tl.dot(grad_out, v.T, input_precision="ieee") - mean[:, None])
    return tl.dot(grad_scores.to(k.dtype), k, grad, input_precision="ieee")


@triton.jit
def _varcli_attend_backward_queries(
    q_ptr, k_ptr, v_ptr, out_ptr, grad_out_ptr, level_ptr, inverse_ptr, log_scale_ptr,
    level_mean_ptr, grad_qkv_ptr, bias_sums_ptr, scale_sums_ptr, cap,
    FIRSTS: tl.constexpr, ENDS: tl.constexpr, SCALE: tl.constexpr,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    first, last = pick(FIRSTS, tile), pick(FIRSTS, tile + 1)
    head, sample = tl.program_id(1), tl.program_id(2).to(tl.int64)
    length: tl.constexpr = ENDS[len(ENDS) - 1]
    token_stride: tl.constexpr = HEADS * WIDTH
    offset = sample * length * token_stride + head * WIDTH
    columns = tl.arange(0, BLOCK)
    tokens = first + tl.arange(0, QUERIES)
    inside = (tokens < last)[:, None] & (columns < WIDTH)[None, :]
    at = offset + tokens[:, None] * token_stride + columns[None, :]
    q = tl.load(q_ptr + at, mask=inside, other=0)
    grad_out = tl.load(grad_out_ptr + at, mask=inside, other=0)
    out = tl.load(out_ptr + at, mask=inside, other=0)
    # of the gradients to a query's weights, the mean by these weights
    mean = tl.sum(out.to(tl.float32) * grad_out.to(tl.float32), axis=1)
    row = (sample * HEADS + head) * length + tokens
    level = tl.load(level_ptr + row, mask=tokens < last, other=0)
    tl.store(level_mean_ptr + 2 * row, level, mask=tokens < last)
    tl.store(level_mean_ptr + 2 * row + 1, mean, mask=tokens < last)
    ends = end_of(tokens, ENDS)
    grad = tl.zeros((QUERIES, BLOCK), tl.float32)
    seen_by_all = end_of(first, ENDS) // KEYS * KEYS
    for start in range(0, seen_by_all, KEYS):
        grad = _query_piece(
            q, grad_out, level, mean, k_ptr + offset, v_ptr + offset, start, ends, columns, token_stride, grad,
            SCALE, length, WIDTH, KEYS, False,
        )  # fmt: skip
    for start in range(seen_by_all, end_of(last - 1, ENDS), KEYS):
        grad = _query_piece(
            q, grad_out, level, mean, k_ptr + offset, v_ptr + offset, start, ends, columns, token_stride, grad,
            SCALE, length, WIDTH, KEYS, True,
        )  # fmt: skip
    # back through the normalisation
    grad *= SCALE
    q_wide = q.to(tl.float32)
    inverse = tl.load(inverse_ptr + (sample * length + tokens) * HEADS + head, mask=tokens < last, other=0)
    log_scale = tl.load(log_scale_ptr + head).to(tl.float32)
    scale = tl.exp(tl.minimum(log_scale, cap))
    along = tl.sum(grad * q_wide, axis=1)
    part = sample * tl.num_programs(0) + tile
    # above its cap the temperature has no gradient
    scale_sum = tl.where(log_scale <= cap, tl.sum(tl.where(tokens < last, along, 0.0), axis=0), 0.0)
    tl.store(scale_sums_ptr + part * HEADS + head, scale_sum)
    along = tl.where(inverse < LONGEST_INVERSE, along / (scale * scale), 0.0)
    grad = (grad - q_wide * along[:, None]) * (inverse * scale)[:, None]
    bias_sum = tl.sum(tl.where(inside, grad, 0.0), axis=0)
    tl.store(bias_sums_ptr + part * token_stride + head * WIDTH + columns, bias_sum, mask=columns < WIDTH)
    at = ((sample * length + tokens) * 3 * HEADS + head)[:, None] * WIDTH + columns[None, :]
    tl.store(grad_qkv_ptr + at, grad.to(grad_qkv_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _key_piece(
    k, v, keys, q_ptr, grad_out_ptr, level_mean_ptr, start, columns, token_stride, grad_k, grad_v,
    SCALE: tl.constexpr, ENDS: tl.constexpr, WIDTH: tl.constexpr, QUERIES: tl.constexpr, IS_CUT: tl.constexpr,
):  # fmt: skip
    """Add to the gradients of keys and values what comes over the queries from `start` on."""
    tokens = start + tl.arange(0, QUERIES)
    is_there = tokens < ENDS[len(ENDS) - 1]
    inside = is_there[:, None] & (columns < WIDTH)[None, :]
    at = tokens[:, None] * token_stride + columns[None, :]
    q = tl.load(q_ptr + at, mask=inside, other=0)
    grad_out = tl.load(grad_out_ptr + at, mask=inside, other=0)
    # in pairs: as two vectors each thread would load all 16 queries of its scores, 4 bytes at a time
    pairs = tl.load(level_mean_ptr + 2 * tokens[:, None] + tl.arange(0, 2)[None, :], mask=is_there[:, None], other=0)
    level, mean = tl.split(pairs)
    scores = tl.dot(k, q.T, input_precision="ieee") * (SCALE * LOG2_E)
    if IS_CUT:
        scores = tl.where(keys[:, None] < end_of(tokens, ENDS)[None, :], scores, float("-inf"))
    weights = tl.exp2(scores - level[None, :])
    grad_v = tl.dot(weights.to(v.dtype), grad_out, grad_v, input_precision="ieee")
    grad_scores = weights * (tl.dot(v, grad_out.T, input_precision="ieee") - mean[None, :])
    return tl.dot(grad_scores.to(q.dtype), q, grad_k, input_precision="ieee"), grad_v


@triton.jit
def _varcli_attend_backward_keys(
    q_ptr, k_ptr, v_ptr, grad_out_ptr, level_mean_ptr, inverse_ptr, grad_qkv_ptr, bias_sums_ptr,
    FIRSTS: tl.constexpr, ENDS: tl.constexpr, SCALE: tl.constexpr,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    first, last = pick(FIRSTS, tile), pick(FIRSTS, tile + 1)
    head, sample = tl.program_id(1), tl.program_id(2).to(tl.int64)
    length: tl.constexpr = ENDS[len(ENDS) - 1]
    token_stride: tl.constexpr = HEADS * WIDTH
    offset = sample * length * token_stride + head * WIDTH
    rows = (sample * HEADS + head) * length
    columns = tl.arange(0, BLOCK)
    keys = first + tl.arange(0, KEYS)
    inside = (keys < last)[:, None] & (columns < WIDTH)[None, :]
    at = offset + keys[:, None] * token_stride + columns[None, :]
    k = tl.load(k_ptr + at, mask=inside, other=0)
    v = tl.load(v_ptr + at, mask=inside, other=0)
    grad_k = tl.zeros((KEYS, BLOCK), tl.float32)
    grad_v = tl.zeros((KEYS, BLOCK), tl.float32)
    begin = start_of(first, ENDS)
    seen_whole = begin + tl.cdiv(start_of(last - 1, ENDS) - begin, QUERIES) * QUERIES
    for start in range(begin, seen_whole, QUERIES):
        grad_k, grad_v = _key_piece(
            k, v, keys, q_ptr + offset, grad_out_ptr + offset, level_mean_ptr + 2 * rows,
            start, columns, token_stride, grad_k, grad_v, SCALE, ENDS, WIDTH, QUERIES, True,
        )  # fmt: skip
    for start in range(seen_whole, length, QUERIES):
        grad_k, grad_v = _key_piece(
            k, v, keys, q_ptr + offset, grad_out_ptr + offset, level_mean_ptr + 2 * rows,
            start, columns, token_stride, grad_k, grad_v, SCALE, ENDS, WIDTH, QUERIES, False,
        )  # fmt: skip
    bias_sum = tl.sum(tl.where(inside, grad_v, 0.0), axis=0)
    part = sample * tl.num_programs(0) + tile
    tl.store(bias_sums_ptr + part * token_stride + head * WIDTH + columns, bias_sum, mask=columns < WIDTH)
    at = ((sample * length + keys) * 3 * HEADS + 2 * HEADS + head)[:, None] * WIDTH + columns[None, :]
    tl.store(grad_qkv_ptr + at, grad_v.to(grad_qkv_ptr.dtype.element_ty), mask=inside)
    # back through the normalisation
    inverse = tl.load(inverse_ptr + (sample * length + keys) * HEADS + head, mask=keys < last, other=0)
    grad_k *= SCALE
    k_wide = k.to(tl.float32)
    along = tl.where(inverse < LONGEST_INVERSE, tl.sum(grad_k * k_wide, axis=1), 0.0)
    grad_k = (grad_k - k_wide * along[:, None]) * inverse[:, None]
    tl.store(grad_qkv_ptr + at - HEADS * WIDTH, grad_k.to(grad_qkv_ptr.dtype.element_ty), mask=inside)


def launch_backward(
    grad_out_BLnd: Tensor,
    q_BLnd: Tensor,
    k_BLnd: Tensor,
    v_BLnd: Tensor,
    out_BLnd: Tensor,
    level_BnL: Tensor,
    q_inverse_BLn: Tensor,
    k_inverse_BLn: Tensor,
    log_scale: Tensor,
    cap: float,
    step_lengths: tuple[int, ...],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradient to qkv (B, L, 3C), and summed in float32 those to both biases (2, C) and to log_scale (n,)."""
    batch, length, heads, width = q_BLnd.shape
    sizes = sizes_of(step_lengths, scale, heads, width)
    grad_qkv = q_BLnd.new_empty(batch, length, 3 * heads * width)
    level_mean = level_BnL.new_empty(*level_BnL.shape, 2)
    firsts = cut_tiles(step_lengths, QUERY_TILES.tile)
    query_sums = level_BnL.new_empty(batch, len(firsts) - 1, heads * width)
    scale_sums = level_BnL.new_empty(batch, len(firsts) - 1, heads)
    with torch.cuda.device_of(q_BLnd):
        _varcli_attend_backward_queries[(len(firsts) - 1, heads, batch)](
            q_BLnd,
            k_BLnd,
            v_BLnd,
            out_BLnd,
            grad_out_BLnd,
            level_BnL,
            q_inverse_BLn,
            log_scale,
            level_mean,
            grad_qkv,
            query_sums,
            scale_sums,
            cap,
            FIRSTS=firsts,
            QUERIES=QUERY_TILES.tile,
            KEYS=QUERY_TILES.piece,
            **QUERY_TILES.options(),
            **sizes,
        )
        firsts = cut_tiles(step_lengths, KEY_TILES.tile)
        value_sums = level_BnL.new_empty(batch, len(firsts) - 1, heads * width)
        _varcli_attend_backward_keys[(len(firsts) - 1, heads, batch)](
            q_BLnd,
            k_BLnd,
            v_BLnd,
            grad_out_BLnd,
            level_mean,
            k_inverse_BLn,
            grad_qkv,
            value_sums,
            FIRSTS=firsts,
            QUERIES=KEY_TILES.piece,
            KEYS=KEY_TILES.tile,
            **KEY_TILES.options(),
            **sizes,
        )
    bias_sums = torch.stack((query_sums.sum(dim=(0, 1)), value_sums.sum(dim=(0, 1))))
    return grad_qkv, bias_sums, scale_sums.sum(dim=(0, 1))
