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


def guide(wanted_BlV: Tensor, unwanted_BlV: Tensor, strength: float) -> Tensor:
    """Classifier-free guidance in VAR's convention: (1 + t) * wanted - t * unwanted."""
    return (1 + strength) * wanted_BlV - strength * unwanted_BlV


def truncate(logits_BlV: Tensor, top_k: int | None = None, top_p: float | None = None) -> Tensor:
    """Set the logits that may not be drawn to -inf.

    top_k: keep the k largest, and what ties with the last of them. top_p: of those, drop the unlikely ones whose summed
    probability stays within 1 - p; the likeliest is always kept. None turns either off.
    """
    if top_k is not None and top_k < logits_BlV.shape[-1]:
        smallest = logits_BlV.topk(top_k, dim=-1).values[..., -1:]
        logits_BlV = logits_BlV.masked_fill(logits_BlV < smallest, -math.inf)
    if top_p is not None and top_p < 1:
        ascending, order = logits_BlV.sort(dim=-1)
        dropped = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - top_p
        dropped[..., -1] = False
        logits_BlV = logits_BlV.masked_fill(dropped.scatter(-1, order, dropped), -math.inf)
    return logits_BlV


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
