"""Is the codebook alive? How much of it each scale uses, and a second life for codes nobody picks."""

from __future__ import annotations

import torch
from torch import Tensor

from varcli.scales import PatchNums
from varcli.tokenizer.quantizer import MultiScaleQuantizer


def count_codes(codes_BL: Tensor, scales: PatchNums, vocab_size: int) -> Tensor:
    """Return how often each scale uses each code: float32 (K, V)."""
    counts = torch.zeros(scales.num_scales, vocab_size, device=codes_BL.device)
    for scale, codes_Bl in enumerate(codes_BL.split(scales.step_lengths, dim=1)):
        flat = codes_Bl.reshape(-1)
        counts[scale].scatter_add_(0, flat, torch.ones_like(flat, dtype=torch.float32))
    return counts


def codebook_report(counts_KV: Tensor) -> dict[str, float]:
    """Turn counts into numbers for a log: share of codes used and perplexity, over all scales and for each.

    Perplexity is exp(entropy) of the usage, between 1 (collapsed) and V (uniform).
    """
    report = {
        "codebook_used": float((counts_KV.sum(dim=0) > 0).float().mean()),
        "perplexity": _perplexity(counts_KV.sum(dim=0)),
    }
    for scale, counts_V in enumerate(counts_KV):
        report[f"codebook_used_scale_{scale}"] = float((counts_V > 0).float().mean())
        report[f"perplexity_scale_{scale}"] = _perplexity(counts_V)
    return report


@torch.no_grad()
def restart_dead_codes(
    quantizer: MultiScaleQuantizer, f_BZhw: Tensor, dead_V: Tensor, generator: torch.Generator
) -> Tensor:
    """Move the codes marked in `dead_V` (bool) onto vectors of the current batch; return their indices.

    Each takes a leftover of a scale drawn uniformly, so that coarse scales, which have few vectors, get their share.
    """
    dead = dead_V.nonzero().squeeze(1)
    leftovers = quantizer.leftovers(f_BZhw)
    scales = torch.randint(len(leftovers), dead.shape, generator=generator, device=dead.device)
    for scale, vectors in enumerate(leftovers):
        chosen = dead[scales == scale]
        rows = torch.randint(len(vectors), chosen.shape, generator=generator, device=dead.device)
        quantizer.codebook.weight[chosen] = vectors[rows]
    return dead


def _perplexity(counts_V: Tensor) -> float:
    share = counts_V / counts_V.sum().clamp(min=1)
    return float(torch.exp(-(share * share.clamp(min=1e-12).log()).sum()))
