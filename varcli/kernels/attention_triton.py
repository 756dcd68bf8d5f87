"""Triton kernel of `varcli.kernels.attention`, forward: block-causal attention of all steps, or of one step over a cache.

Tokens are cut into tiles at the bounds of steps, so that nearly all that is computed is seen: a tile's queries read the keys
up to the end of their step, and only where short steps share a tile some are hidden. A program takes one head of one tile.

Source: online softmax as in FlashAttention-2 (arXiv:2307.08691).
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)


class Tiling(NamedTuple):
    """How a kernel is cut: tokens of a tile, tokens of the other side at a time, warps, and loads under way."""

    tile: int
    piece: int
    num_warps: int
    num_stages: int


# two programs a multiprocessor of an H100, without spilled registers; not timed yet (examples/benchmarks/attention_shapes.py)
FORWARD = Tiling(128, 64, 8, 3)


@functools.cache
def cut_tiles(step_lengths: tuple[int, ...], size: int) -> tuple[int, ...]:
    """First token of each tile of at most `size` tokens, and the number of all: a step that fills a tile begins one."""
    firsts, start = [0], 0
    for length in step_lengths:
        if length >= size and start > firsts[-1]:
            firsts.append(start)
        start += length
        while start - firsts[-1] > size:
            firsts.append(firsts[-1] + size)
    return (*firsts, start)


@triton.jit
def pick(table: tl.constexpr, index):
    """The entry of a tuple at an index that is known when the kernel runs."""
    value = index * 0
    for place in tl.static_range(len(table)):
        value = tl.where(index == place, table[place], value)
    return value


@triton.jit
def start_of(tokens, ENDS: tl.constexpr):
    """First token of the step that each of these tokens belongs to."""
    starts = tokens * 0
    for step in tl.static_range(1, len(ENDS)):
        starts = tl.where(tokens >= ENDS[step - 1], ENDS[step - 1], starts)
    return starts


@triton.jit
def end_of(tokens, ENDS: tl.constexpr):
    """End of the step that each of these tokens belongs to."""
    ends = tokens * 0 + ENDS[0]
    for step in tl.static_range(1, len(ENDS)):
        ends = tl.where(tokens >= ENDS[step - 1], ENDS[step], ends)
    return ends


@triton.jit
def _attend_piece(
    q, k_ptr, v_ptr, start, ends, num_keys, columns, token_stride, peak, total, out,
    SCALE: tl.constexpr, WIDTH: tl.constexpr, KEYS: tl.constexpr, IS_CUT: tl.constexpr,
):  # fmt: skip
    """Let queries see the keys from `start` on; IS_CUT: not all of them see all of these."""
    keys = start + tl.arange(0, KEYS)
    at = keys[:, None] * token_stride + columns[None, :]
    inside = columns[None, :] < WIDTH
    if IS_CUT:
        inside &= (keys < num_keys)[:, None]
    k = tl.load(k_ptr + at, mask=inside, other=0)
    scores = tl.dot(q, k.T, input_precision="ieee")
    if IS_CUT:
        scores = tl.where(keys[None, :] < ends[:, None], scores, float("-inf"))
    higher = tl.maximum(peak, tl.max(scores, axis=1) * (SCALE * LOG2_E))
    weights = tl.exp2(scores * (SCALE * LOG2_E) - higher[:, None])  # one multiply-add each
    faded = tl.exp2(peak - higher)
    v = tl.load(v_ptr + at, mask=inside, other=0)
    out = tl.dot(weights.to(v.dtype), v, out * faded[:, None], input_precision="ieee")
    return higher, total * faded + tl.sum(weights, axis=1), out


@triton.jit
def _varcli_attend(
    q_ptr, k_ptr, v_ptr, out_ptr, level_ptr, kv_sample_stride, kv_token_stride, kv_head_stride, length, num_keys,
    FIRSTS: tl.constexpr, ENDS: tl.constexpr, SCALE: tl.constexpr,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    # without ENDS all queries are of one step, the last, which sees all keys
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # those with the most keys first
    if len(ENDS) > 0:
        first, last = pick(FIRSTS, tile), pick(FIRSTS, tile + 1)
        seen_by_all, seen = end_of(first, ENDS), end_of(last - 1, ENDS)
    else:
        first = tile * QUERIES
        last = min(first + QUERIES, length)
        seen_by_all, seen = num_keys, num_keys
    head, sample = tl.program_id(1), tl.program_id(2).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    tokens = first + tl.arange(0, QUERIES)
    ends = end_of(tokens, ENDS) if len(ENDS) > 0 else tokens * 0 + num_keys
    inside = (tokens < last)[:, None] & (columns < WIDTH)[None, :]
    at = ((sample * length + tokens) * HEADS + head)[:, None] * WIDTH + columns[None, :]
    q = tl.load(q_ptr + at, mask=inside, other=0)
    k_ptr += sample * kv_sample_stride + head * kv_head_stride
    v_ptr += sample * kv_sample_stride + head * kv_head_stride
    peak = tl.full((QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    out = tl.zeros((QUERIES, BLOCK), tl.float32)
    seen_by_all = seen_by_all // KEYS * KEYS
    for start in range(0, seen_by_all, KEYS):
        peak, total, out = _attend_piece(
            q, k_ptr, v_ptr, start, ends, num_keys, columns, kv_token_stride, peak, total, out, SCALE, WIDTH, KEYS, False
        )  # fmt: skip
    for start in range(seen_by_all, seen, KEYS):
        peak, total, out = _attend_piece(
            q, k_ptr, v_ptr, start, ends, num_keys, columns, kv_token_stride, peak, total, out, SCALE, WIDTH, KEYS, True
        )  # fmt: skip
    tl.store(out_ptr + at, (out / total[:, None]).to(out_ptr.dtype.element_ty), mask=inside)
    if len(ENDS) > 0:
        tl.store(level_ptr + (sample * HEADS + head) * length + tokens, peak + tl.log2(total), mask=tokens < last)


def launch_forward(
    q_BLnd: Tensor, k_BLnd: Tensor, v_BLnd: Tensor, step_lengths: tuple[int, ...], scale: float
) -> tuple[Tensor, Tensor]:
    """Return what queries see, (B, L, n, d), and the log2 of their softmax's sum, (B, n, L) float32."""
    batch, length, heads, width = q_BLnd.shape
    out, level = torch.empty_like(q_BLnd), q_BLnd.new_empty(batch, heads, length, dtype=torch.float32)
    firsts = cut_tiles(step_lengths, FORWARD.tile)
    with torch.cuda.device_of(q_BLnd):
        _varcli_attend[(len(firsts) - 1, heads, batch)](
            q_BLnd,
            k_BLnd,
            v_BLnd,
            out,
            level,
            *k_BLnd.stride()[:3],
            length,
            length,
            FIRSTS=firsts,
            QUERIES=FORWARD.tile,
            KEYS=FORWARD.piece,
            num_warps=FORWARD.num_warps,
            num_stages=FORWARD.num_stages,
            **sizes_of(step_lengths, scale, heads, width),
        )
    return out, level


def launch_step(q_Blnd: Tensor, k_BnLd: Tensor, v_BnLd: Tensor, scale: float) -> Tensor:
    """Return what the queries of one step see of all keys, (B, l, n, d). Keys and values: of equal strides, channels dense."""
    (batch, length, heads, width), num_keys = q_Blnd.shape, k_BnLd.shape[2]
    assert k_BnLd.stride() == v_BnLd.stride() and k_BnLd.stride(3) == 1, (k_BnLd.stride(), v_BnLd.stride())
    sample_stride, head_stride, token_stride, _ = k_BnLd.stride()
    out, tile = torch.empty_like(q_Blnd), min(FORWARD.tile, max(16, triton.next_power_of_2(length)))
    with torch.cuda.device_of(q_Blnd):
        _varcli_attend[(triton.cdiv(length, tile), heads, batch)](
            q_Blnd,
            k_BnLd,
            v_BnLd,
            out,
            None,
            sample_stride,
            token_stride,
            head_stride,
            length,
            num_keys,
            FIRSTS=(),
            QUERIES=tile,
            KEYS=FORWARD.piece,
            num_warps=FORWARD.num_warps if tile == FORWARD.tile else 4,
            num_stages=FORWARD.num_stages,
            **sizes_of((), scale, heads, width),
        )
    return out


def sizes_of(step_lengths: tuple[int, ...], scale: float, heads: int, width: int) -> dict[str, object]:
    """Constants that all of these kernels take."""
    ends = tuple(sum(step_lengths[: step + 1]) for step in range(len(step_lengths)))
    return {
        "ENDS": ends,
        "SCALE": scale,
        "HEADS": heads,
        "WIDTH": width,
        "BLOCK": max(16, triton.next_power_of_2(width)),
    }
