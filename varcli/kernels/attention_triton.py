"""Triton kernel of `varcli.kernels.attention`, forward: block-causal attention of all steps.

Tokens are cut into tiles at the bounds of steps, so that nearly all that is computed is seen: a tile's queries read the keys
up to the end of their step, and only where short steps share a tile some are hidden. A program takes one head of one tile.

Source: online softmax as in FlashAttention-2 (arXiv:2307.08691).
"""

from __future__ import annotations

import functools
import itertools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)


class Tiling(NamedTuple):
    """How a kernel is cut: tokens of a tile, of the other side at a time, warps, loads under way, most registers a thread."""

    tile: int
    piece: int
    num_warps: int
    num_stages: int
    registers: int | None = None

    def options(self) -> dict[str, int | None]:
        """What Triton is told when a kernel is launched."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "maxnreg": self.registers}


# the fastest of ten on an H100 (examples/benchmarks/attention_shapes.py)
FORWARD = Tiling(64, 64, 4, 3)


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
def see_piece(
    q, k_ptr, v_ptr, start, ends, columns, peak, total, out, num_keys, token_stride,
    SCALE: tl.constexpr, WIDTH: tl.constexpr, KEYS: tl.constexpr, IS_CUT: tl.constexpr,
):  # fmt: skip
    """Let queries see the keys from `start` on: their highest score so far times log2(e), the sum of weights below it, and out.

    ends: where the keys that each query sees end; num_keys: where all do. Both count only if IS_CUT.
    """
    keys = start + tl.arange(0, KEYS)
    at = keys[:, None] * token_stride + columns[None, :]
    inside = columns[None, :] < WIDTH
    if IS_CUT:
        inside &= (keys < num_keys)[:, None]
    k = tl.load(k_ptr + at, mask=inside, other=0)
    v = tl.load(v_ptr + at, mask=inside, other=0)
    scores = tl.dot(q, k.T, input_precision="ieee")
    if IS_CUT:
        scores = tl.where(keys[None, :] < ends[:, None], scores, float("-inf"))
    higher = tl.maximum(peak, tl.max(scores, axis=1) * (SCALE * LOG2_E))
    weights = tl.exp2(scores * (SCALE * LOG2_E) - higher[:, None])  # one multiply-add each
    faded = tl.exp2(peak - higher)
    out = tl.dot(weights.to(v.dtype), v, out * faded[:, None], input_precision="ieee")
    return higher, total * faded + tl.sum(weights, axis=1), out


@triton.jit
def _varcli_attend(
    q_ptr, k_ptr, v_ptr, out_ptr, level_ptr,
    FIRSTS: tl.constexpr, ENDS: tl.constexpr, SCALE: tl.constexpr,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # those with the most keys first
    first, last = pick(FIRSTS, tile), pick(FIRSTS, tile + 1)
    head, sample = tl.program_id(1), tl.program_id(2).to(tl.int64)
    length: tl.constexpr = ENDS[len(ENDS) - 1]
    stride: tl.constexpr = HEADS * WIDTH
    offset = sample * length * stride + head * WIDTH
    columns = tl.arange(0, BLOCK)
    tokens = first + tl.arange(0, QUERIES)
    inside = (tokens < last)[:, None] & (columns < WIDTH)[None, :]
    at = offset + tokens[:, None] * stride + columns[None, :]
    q = tl.load(q_ptr + at, mask=inside, other=0)
    k_ptr += offset
    v_ptr += offset
    ends = end_of(tokens, ENDS)
    peak = tl.full((QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    out = tl.zeros((QUERIES, BLOCK), tl.float32)
    seen_by_all = end_of(first, ENDS) // KEYS * KEYS
    for start in range(0, seen_by_all, KEYS):
        peak, total, out = see_piece(
            q, k_ptr, v_ptr, start, ends, columns, peak, total, out, length, stride, SCALE, WIDTH, KEYS, False
        )  # fmt: skip
    for start in range(seen_by_all, end_of(last - 1, ENDS), KEYS):
        peak, total, out = see_piece(
            q, k_ptr, v_ptr, start, ends, columns, peak, total, out, length, stride, SCALE, WIDTH, KEYS, True
        )  # fmt: skip
    tl.store(out_ptr + at, (out / total[:, None]).to(out_ptr.dtype.element_ty), mask=inside)
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
            FIRSTS=firsts,
            QUERIES=FORWARD.tile,
            KEYS=FORWARD.piece,
            **FORWARD.options(),
            **sizes_of(step_lengths, scale, heads, width),
        )
    return out, level


def sizes_of(step_lengths: tuple[int, ...], scale: float, heads: int, width: int) -> dict[str, object]:
    """Constants that all of these kernels take."""
    ends = tuple(itertools.accumulate(step_lengths))
    block = max(16, triton.next_power_of_2(width))
    return {"ENDS": ends, "SCALE": scale, "HEADS": heads, "WIDTH": width, "BLOCK": block}
