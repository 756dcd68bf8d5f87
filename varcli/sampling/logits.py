"""From a step's logits to its codes: guidance, truncation, the draw, and smooth vectors in place of codes.

Source: VAR's released sampler; conventions as there, so a guidance of 0 is none.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

CFG_SCHEDULES: dict[str, Callable[[float], float]] = {
    "linear": lambda progress: progress,
    "cosine": lambda progress: 0.5 - 0.5 * math.cos(math.pi * progress),
    "constant": lambda progress: 1.0,
}
"""Share of the guidance in force at progress k / (K - 1); VAR's is `linear`, which leaves the first step alone."""


def guide(wanted_BlV: Tensor, unwanted_BlV: Tensor | None, strength: float) -> Tensor:
    """Classifier-free guidance in VAR's convention: (1 + t) * wanted - t * unwanted, in float32; None is no guidance."""
    if unwanted_BlV is None:
        return wanted_BlV.float()
    return (1 + strength) * wanted_BlV.float() - strength * unwanted_BlV.float()


def truncate(logits_BlV: Tensor, top_k: int | None = None, top_p: float | None = None) -> Tensor:
    """Set the logits that may not be drawn to -inf.

    top_k: keep the k largest. top_p: of those, keep each whose likelier ones have less than p of the probability together,
    so the likeliest always stays. What ties with the last one kept stays, in both. None turns either off.
    """
    vocab_size = logits_BlV.shape[-1]
    top_k = None if top_k is None or top_k >= vocab_size else top_k
    top_p = None if top_p is None or top_p >= 1 else top_p
    if top_k is None and top_p is None:
        return logits_BlV
    largest = logits_BlV.topk(top_k or vocab_size, dim=-1).values  # from large to small
    limit = largest[..., -1:]
    if top_p is not None:
        # only what ties with the k-th largest can lie outside of `largest`
        total = (logits_BlV - largest[..., :1]).exp().masked_fill(logits_BlV < limit, 0).sum(dim=-1, keepdim=True)
        shares = (largest - largest[..., :1]).exp() / total
        is_kept = shares.cumsum(dim=-1) - shares < top_p
        limit = largest.masked_fill(~is_kept, math.inf).amin(dim=-1, keepdim=True)
    return logits_BlV.masked_fill(logits_BlV < limit, -math.inf)


def draw(logits_BlV: Tensor, noise_BlV: Tensor) -> Tensor:
    """Draw one code a position, int64 (B, l), from softmax(logits), given Exp(1) noise.

    argmax(p / q) with q ~ Exp(1) has distribution p; it is what torch.multinomial computes for a single draw.
    """
    return (logits_BlV.softmax(dim=-1) / noise_BlV).argmax(dim=-1)


def smooth_vectors(logits_BlV: Tensor, noise_BlV: Tensor, codebook_VZ: Tensor, progress: float) -> Tensor:
    """Blend code vectors (B, l, Z) by a Gumbel softmax that sharpens with progress k / (K - 1): VAR's "more smooth".

    logits: truncated. noise: Exp(1). For pictures to look at, never for a metric.
    """
    temperature = max(0.27 * (1 - 0.95 * progress), 0.005)
    gumbel = -noise_BlV.log()
    return ((logits_BlV * (1 + progress) + gumbel) / temperature).softmax(dim=-1) @ codebook_VZ
