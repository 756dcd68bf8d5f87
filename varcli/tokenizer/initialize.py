"""A codebook to begin training with that lies where the encoder's features are, instead of anywhere."""

from __future__ import annotations

import torch
from torch import Tensor

from varcli.errors import DataError
from varcli.tokenizer.quantizer import MultiScaleQuantizer, nearest_rows

_ROUNDS = 10  # of k-means
_VECTORS_PER_CODE = 256  # that k-means looks at, at most; more move its centres little


@torch.no_grad()
def init_codebook(quantizer: MultiScaleQuantizer, f_BZhw: Tensor, generator: torch.Generator) -> None:
    """Set the codebook to the centres (k-means) of what each scale is asked to encode of a batch of features.

    Scale by scale, coarse to fine, as in encoding: the centres of one scale's vectors become its share of the codes, and
    what those leave over is the next one's. Each has an equal share, but no more codes than it has vectors, so that the
    1x1 scale takes one an image at most; what is left goes to finer scales. Raises DataError for features that are no
    numbers.
    """
    if not f_BZhw.isfinite().all():
        raise DataError("the encoder's features of the first images are no numbers: no codebook can be made of them")
    table, num_scales = quantizer.codebook.weight, quantizer.scales.num_scales
    f_rest, done = f_BZhw.float(), 0
    with torch.autocast(f_BZhw.device.type, enabled=False):
        for scale in range(num_scales):
            vectors = quantizer.shrink(f_rest, scale)
            count = -(-(len(table) - done) // (num_scales - scale))
            if scale < num_scales - 1:
                count = min(count, len(vectors))
            centres = k_means(vectors, count, quantizer.cosine_codes, generator)
            # the codes after these are copies for now: the first of equal ones is chosen
            table[done:] = centres[-1] if count else table[0]
            table[done : done + count] = centres
            done += count
            codes = quantizer.nearest(vectors).view(len(f_rest), -1)
            f_rest = f_rest - quantizer.contribution(quantizer.lookup(codes), scale)


@torch.no_grad()
def k_means(vectors_NZ: Tensor, count: int, by_angle: bool, generator: torch.Generator) -> Tensor:
    """Return `count` centres (count, Z) of vectors (N, Z), from random ones of them on (Lloyd's rounds).

    by_angle: vectors belong to the centre of the least angle, else to the nearest. A centre that loses all its vectors
    stays. With fewer vectors than centres some come twice.
    """
    shuffled = vectors_NZ[torch.randperm(len(vectors_NZ), generator=generator, device=vectors_NZ.device)]
    vectors = shuffled[: max(count, 1) * _VECTORS_PER_CODE]
    centres = vectors.repeat(-(-count // len(vectors)), 1)[:count].clone()
    if count == 0:
        return centres
    for _ in range(_ROUNDS):
        owner = nearest_rows(vectors, centres, by_angle)
        sums = torch.zeros_like(centres).index_add_(0, owner, vectors)
        sizes = torch.bincount(owner, minlength=count).unsqueeze(1)
        centres = torch.where(sizes > 0, sums / sizes.clamp(min=1), centres)
    return centres
