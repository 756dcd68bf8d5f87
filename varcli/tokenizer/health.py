"""Is the codebook alive? How much of it each scale uses, and a second life for codes nobody picks."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from varcli.distributed import ALONE, World
from varcli.scales import PatchNums
from varcli.tokenizer.quantizer import MultiScaleQuantizer

# codes of a scale, and share of those it could use, below which it has collapsed
_MIN_PERPLEXITY, _MIN_SHARE = 2.0, 0.01
_MIN_USED = 0.3  # share of the codebook
_MIN_PICKS = 64  # of a scale, below which its codes say more about the few images than about the scale
_MIN_PICKS_PER_CODE = 10  # of all scales, below which an unused code may just not have had its turn


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


def find_collapse(
    report: Mapping[str, float], scales: PatchNums, vocab_size: int, num_images: int
) -> dict[int | None, str]:
    """Say of each scale that has collapsed, and of the whole codebook (None), what is wrong.

    report: of `codebook_report`, counted over `num_images` images. A scale has collapsed if its perplexity is below two
    codes, or below 1 % of the codes it could have used (all of them, or one a pick if that is fewer); the codebook if less
    than 30 % of it is used. What too few picks were counted for is not judged. The thresholds are our own: a healthy
    emoji64 tokenizer of 1,024 codes used 14 % of them at its 1x1 scale.
    """
    found: dict[int | None, str] = {}
    for scale, (side, length) in enumerate(zip(scales, scales.step_lengths, strict=True)):
        picks, perplexity = num_images * length, report[f"perplexity_scale_{scale}"]
        if picks >= _MIN_PICKS and perplexity < max(_MIN_PERPLEXITY, _MIN_SHARE * min(vocab_size, picks)):
            found[scale] = (
                f"the {side}x{side} scale has collapsed: its {picks:,} picks are worth {perplexity:.3g} "
                f"of {vocab_size:,} codes (perplexity)"
            )
    used = report["codebook_used"]
    if num_images * scales.seq_len >= _MIN_PICKS_PER_CODE * vocab_size and used < _MIN_USED:
        found[None] = f"the codebook is collapsing: {used:.0%} of its {vocab_size:,} codes are used"
    return found


@torch.no_grad()
def restart_dead_codes(
    quantizer: MultiScaleQuantizer, f_BZhw: Tensor, dead_V: Tensor, generator: torch.Generator, world: World = ALONE
) -> Tensor:
    """Move the codes marked in `dead_V` (bool) onto vectors of the current batch; return their indices.

    Each takes a leftover of a scale drawn uniformly, so that coarse scales, which have few vectors, get their share. A
    code stays where it is if its leftover is no number: a bad batch must not spoil the codebook. world: processes that
    have a part of the batch each; with equal generators and `dead_V` they end with equal codebooks.
    """
    dead = dead_V.nonzero().squeeze(1)
    leftovers = [world.gather(vectors) for vectors in quantizer.leftovers(f_BZhw)]
    scales = torch.randint(len(leftovers), dead.shape, generator=generator, device=dead.device)
    for scale, vectors in enumerate(leftovers):
        chosen = dead[scales == scale]
        rows = torch.randint(len(vectors), chosen.shape, generator=generator, device=dead.device)
        found = vectors[rows]
        table = quantizer.codebook.weight
        table[chosen] = torch.where(found.isfinite().all(dim=1, keepdim=True), found, table[chosen])
    return dead


def _perplexity(counts_V: Tensor) -> float:
    share = counts_V / counts_V.sum().clamp(min=1)
    return float(torch.exp(-(share * share.clamp(min=1e-12).log()).sum()))
