"""Work of a transformer over next-scale steps, in floating-point operations (a multiply and an add count as two).

The closed forms agree with counting every matrix product of the reference implementation to within 1 %.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate


def num_parameters(
    depth: int,
    width: int,
    *,
    step_lengths: Sequence[int],
    vocab_size: int = 4096,
    code_channels: int = 32,
    num_classes: int = 1000,
    shared_adaln: bool = False,
) -> int:
    """Parameters of a VAR transformer whose heads are 64 wide, q and k normalised (one scale a head)."""
    heads = max(width // 64, 1)
    block = (12 if shared_adaln else 18) * width * width + 14 * width + heads
    shared = 6 * width * width + 6 * width if shared_adaln else 0
    embeddings = width * (step_lengths[0] + sum(step_lengths) + code_channels + 1 + num_classes + 1 + len(step_lengths))
    head = 2 * width * width + 2 * width + vocab_size * width + vocab_size
    return depth * block + shared + embeddings + head


def forward_flops(depth: int, width: int, step_lengths: Sequence[int], vocab_size: int = 4096) -> int:
    """One image through the transformer with teacher forcing, attention counted as a dense L x L product."""
    length = sum(step_lengths)
    per_token = depth * 24 * width * width + 2 * width * vocab_size
    return length * per_token + depth * 4 * length * length * width


def training_flops(depth: int, width: int, step_lengths: Sequence[int], vocab_size: int = 4096) -> int:
    """One image forward and backward: three times the forward work."""
    return 3 * forward_flops(depth, width, step_lengths, vocab_size)


def sampling_flops(depth: int, width: int, step_lengths: Sequence[int], vocab_size: int = 4096, rows: int = 2) -> int:
    """One image drawn step by step with a key/value cache; `rows` is 2 with guidance, 1 without. The decoder is extra."""
    tokens = sum(step_lengths) * (depth * 24 * width * width + 2 * width * vocab_size)
    seen = accumulate(step_lengths)
    attention = sum(4 * width * length * keys for length, keys in zip(step_lengths, seen, strict=True)) * depth
    return rows * (tokens + attention)
