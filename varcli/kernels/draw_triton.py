"""Logits to codes in one pass over each token's row: guidance, truncation, noise and the draw, in Triton.

What `guide`, `truncate` and `draw` of varcli.sampling.logits compute with the noise of varcli.sampling.noise: a row stays in
registers, its k-th largest value and the limit of top-p are found by search among the bits of floats instead of by a sort,
and the noise is made where it is used. Only rounding differs. Needs Triton, which comes with torch for CUDA.
"""

from __future__ import annotations

from statistics import NormalDist

import torch
import triton
import triton.language as tl
from torch import Tensor

# of splitmix64, as in varcli.sampling.noise, which this room does not see: signed 64-bit numbers
GOLDEN = tl.constexpr(-7046029254386353131)
MIX_1 = tl.constexpr(-4658895280553007687)
MIX_2 = tl.constexpr(-7723592293110705685)

_MARGIN = 0.1  # standard deviations to both sides of where the k-th of normally distributed logits would be
_CUTS = 7  # after which a search looks which codes are left


def draw_codes(
    wanted_BlV: Tensor,
    unwanted_BlV: Tensor | None,
    keys_B: Tensor,
    salt: int,
    strength: float,
    top_k: int | None,
    top_p: float | None,
    is_bad: Tensor,
) -> Tensor:
    """Draw one code a position, int64 (B, l).

    wanted, unwanted: logits of the class, and of no class or None, of any float dtype. keys, salt: int64, of the images' and
    the step's noise. strength: of guidance. is_bad: 0-d int32, set to 1 if a guided logit is no finite number; the row's
    code is 0 then.
    """
    batch, length, vocab_size = wanted_BlV.shape
    codes_Bl = torch.empty(batch, length, dtype=torch.int64, device=wanted_BlV.device)
    wanted_BlV = wanted_BlV.contiguous()
    block = triton.next_power_of_2(vocab_size)
    has_top_k = top_k is not None and top_k < vocab_size
    if unwanted_BlV is None:
        unwanted_BlV, strength = wanted_BlV, 0.0
    with torch.cuda.device_of(wanted_BlV):
        _draw_row[(batch * length,)](
            wanted_BlV,
            unwanted_BlV.contiguous(),
            keys_B,
            salt,
            codes_Bl,
            is_bad,
            length,
            vocab_size,
            float(strength),
            top_k if has_top_k else vocab_size,
            NormalDist().inv_cdf(1 - top_k / vocab_size) if has_top_k else 0.0,
            float(top_p or 1.0),
            HAS_TOP_K=has_top_k,
            HAS_TOP_P=top_p is not None and top_p < 1,
            BLOCK=block,
            SECOND=2**16 if vocab_size < 2**15 else 2**32,  # what a second count is worth in a sum with a first
            MARGIN=_MARGIN,
            CUTS=_CUTS,
            num_warps=_num_warps(block),
        )
    return codes_Bl


def _num_warps(block: int) -> int:
    """Return how many warps draw a row, whatever the batch: sums in another order might draw another code."""
    # 64 x 256 rows of 4,096 on an H100: 1.28 ms with 4, and 1.52, 1.45 and 1.89 with 2, 8 and 16; one row 25 us, with 8 21;
    # a large block in few warps takes a minute to compile
    return min(32, max(4, block // 1024))


@triton.jit
def _add_two(a, b, c, d):
    return a + c, b + d


@triton.jit
def _rank(value):
    """Numbers in the order of these floats, so that a limit can be found by cutting the numbers between two in three."""
    bits = value.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _distance(low, high):
    """From one int32 to another that is not below it, as a number without sign, since it may be too large for one with."""
    return high.to(tl.uint32, bitcast=True) - low.to(tl.uint32, bitcast=True)


@triton.jit
def _third(distance):
    return (distance // 3).to(tl.int32, bitcast=True)


@triton.jit
def _mix(value):
    value = (value ^ ((value >> 30) & 0x3FFFFFFFF)) * MIX_1
    value = (value ^ ((value >> 27) & 0x1FFFFFFFFF)) * MIX_2
    return value ^ ((value >> 31) & 0x1FFFFFFFF)


@triton.jit(do_not_specialize=["salt", "length"])  # else steps differ, and each kind takes two seconds to compile
def _draw_row(
    wanted,
    unwanted,
    keys,
    salt,
    codes,
    is_bad,
    length,
    vocab_size,
    strength,
    top_k,
    quantile,
    top_p,
    HAS_TOP_K: tl.constexpr,
    HAS_TOP_P: tl.constexpr,
    BLOCK: tl.constexpr,
    SECOND: tl.constexpr,
    MARGIN: tl.constexpr,
    CUTS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    code = tl.arange(0, BLOCK)
    is_code = code < vocab_size
    place = row * vocab_size + code
    value = tl.load(wanted + place, mask=is_code, other=0.0).to(tl.float32)
    other = tl.load(unwanted + place, mask=is_code, other=0.0).to(tl.float32)
    value = (1 + strength) * value - strength * other
    # x - x is 0 for every finite number
    is_row_bad = tl.sum(tl.where(value - value == 0, 0, 1), 0) > 0
    value = tl.where(is_row_bad, 0.0, value) + 0.0  # -0.0 becomes 0.0: they tie

    rank = tl.where(is_code, _rank(value), -2147483648)
    highest, limit = tl.max(rank, 0), tl.min(tl.where(is_code, rank, 2147483647), 0)
    if HAS_TOP_K:  # the largest limit that at least k codes reach, or one that k codes reach
        high = highest
        mean, square = tl.reduce((value, value * value), 0, _add_two)
        mean, square = mean / vocab_size, square / vocab_size
        spread = tl.sqrt(tl.maximum(square - mean * mean, 0.0))
        # first where a normal distribution's would be, then in the middle of what is left
        first, second = _rank(mean + (quantile - MARGIN) * spread), _rank(mean + (quantile + MARGIN) * spread)
        while limit < high:
            first = tl.maximum(tl.minimum(first, high), limit + 1)
            second = tl.maximum(tl.minimum(second, high), first)
            # both counts in one sum
            reached = tl.where(rank >= first, 1, 0) + tl.where(rank >= second, SECOND, 0)
            counts = tl.sum(reached.to(tl.int32 if SECOND < 2**31 else tl.int64), 0)
            if counts // SECOND >= top_k:
                limit = second
                high = tl.where(counts // SECOND == top_k, second, high)
            elif counts % SECOND >= top_k:
                limit = first
                high = tl.where(counts % SECOND == top_k, first, second - 1)
            else:
                high = first - 1
            width = _distance(limit, high)
            first, second = limit + _third(width + 2), high - _third(width)
    if HAS_TOP_P:  # the smallest limit above which less than p of the kept probability lies
        largest = tl.max(tl.where(is_code, value, -float("inf")), 0)
        weight = tl.where(is_code & (rank >= limit), tl.exp(value - largest), 0.0)
        allowed = top_p * tl.sum(weight, 0)
        high = highest
        cuts = 0
        while limit < high:
            width = _distance(limit, high)
            first, second = limit + _third(width), high - _third(width + 2)
            beyond = tl.where(rank > first, weight, 0.0), tl.where(rank > second, weight, 0.0)
            above_first, above_second = tl.reduce(beyond, 0, _add_two)
            if above_first < allowed:
                high = first
            elif above_second < allowed:
                limit = first + 1
                high = second
            else:
                limit = second + 1
            cuts += 1
            if cuts % CUTS == 0:  # by now few codes are left, of which one has the limit
                is_left = (rank >= limit) & (rank <= high)
                lowest = tl.min(tl.where(is_left, rank, high), 0)
                high = tl.max(tl.where(is_left, rank, limit), 0)
                limit = lowest

    key = _mix(_mix(tl.load(keys + row // length) + salt))
    position = row % length
    hashed = _mix(key + (position * vocab_size + code.to(tl.int64) + 1) * GOLDEN)
    uniform = (((hashed >> 41) & 0x7FFFFF).to(tl.float32) + 0.5) / 8388608.0
    # argmax of p / q is argmax of log p - log q
    score = value - tl.log(-tl.log(uniform))
    score = tl.where(is_code & (rank >= limit), score, -float("inf"))
    chosen = tl.argmax(score, 0)
    tl.store(codes + row, tl.where(is_row_bad, 0, chosen).to(tl.int64))
    if is_row_bad:
        tl.store(is_bad, 1)
