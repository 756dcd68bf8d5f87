"""How far the codes of a fast encoder are those of float32, and what the difference does to reconstructions."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from varcli.tokenizer.batch_encoder import BatchEncoder, pixels_to_floats
from varcli.tokenizer.judge import peak_signal_to_noise

ENOUGH = 0.995  # of all tokens; below it a fast mode is warned of


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Codes of one encoder against those of float32, on the same images."""

    images: int  # that were compared
    tokens: float  # share of tokens with the same code, in [0, 1]
    by_scale: tuple[float, ...]  # the same for each scale, coarse to fine
    psnr: float  # dB, mean over images, of the reconstructions from the fast codes
    psnr_fp32: float  # dB, of those from float32's codes

    @property
    def is_enough(self) -> bool:
        """Whether so many tokens agree that nobody need be warned."""
        return self.tokens >= ENOUGH

    def to_json(self) -> dict[str, Any]:
        """Plain values, rounded to what means something."""
        values = {key: value for key, value in asdict(self).items() if key != "by_scale"}
        rounded = {key: round(value, 6) if isinstance(value, float) else value for key, value in values.items()}
        return {**rounded, "by_scale": [round(share, 6) for share in self.by_scale]}


def measure_agreement(encoder: BatchEncoder, batches: Iterable[Tensor]) -> Agreement | None:
    """Encode uint8 batches (B, 3, H, W) with `encoder` and in float32, and decode both with the same decoder.

    A code that differs changes what all finer scales have left to encode, so agreement falls from scale to scale.
    Returns None if there is no image.
    """
    model = encoder.model
    exact = BatchEncoder(model, torch.float32, encoder.batch_size)
    count, hits, psnrs = 0, torch.zeros(model.config.scales.num_scales, dtype=torch.float64), [0.0, 0.0]
    for batch in batches:
        for images in batch.split(encoder.batch_size):
            codes, expected = encoder.encode(images), exact.encode(images)
            same = (codes == expected).sum(dim=0).split(model.config.scales.step_lengths)
            hits += torch.stack([scale.sum() for scale in same]).cpu()
            pixels = pixels_to_floats(images.to(encoder.device))
            psnrs = [
                total + _summed_psnr(encoder, found, pixels)
                for total, found in zip(psnrs, (codes, expected), strict=True)
            ]
            count += len(images)
    if not count:
        return None
    lengths = torch.tensor(model.config.scales.step_lengths)
    return Agreement(
        images=count,
        tokens=float(hits.sum() / (count * lengths.sum())),
        by_scale=tuple((hits / (count * lengths)).tolist()),
        psnr=psnrs[0] / count,
        psnr_fp32=psnrs[1] / count,
    )


_DECODED_AT_ONCE = 32  # images; the decoder takes more memory than the encoder


@torch.no_grad()
def _summed_psnr(encoder: BatchEncoder, codes_BL: Tensor, pixels: Tensor) -> float:
    total = 0.0
    for codes, images in zip(codes_BL.split(_DECODED_AT_ONCE), pixels.split(_DECODED_AT_ONCE), strict=True):
        decoded = encoder.model.decode(encoder.model.quantizer.embed(codes))
        errors = (decoded - images).square().mean(dim=(1, 2, 3)).clamp(min=1e-10)
        total += float(peak_signal_to_noise(errors, peak=2).sum())
    return total
