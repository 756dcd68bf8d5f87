"""From a step's logits to the vectors that it adds: guidance, truncation and draw, or a blend of codes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from varcli.kernels import HAS_TRITON
from varcli.order.base import Order
from varcli.sampling.logits import draw, guide, smooth_vectors, truncate
from varcli.sampling.noise import STREAM_CODES, STREAM_SMOOTH, KeyedNoise, Noise, salt
from varcli.sampling.settings import SampleConfig

Choose = Callable[[int, Tensor, Tensor | None, float], Tensor]
"""From (step, logits (B, l, V) of the class, those of no class or None, strength of guidance) to vectors (B, l, Z)."""


class CodeChooser:
    """Draws the vectors of each step from its logits, and keeps them in `drawn`.

    codebook_VZ: float32, for smooth vectors. is_bad: 0-d int32 on the device, 1 after a logit that was no finite number;
    reading it waits for the device, so look once all is drawn.
    """

    def __init__(self, order: Order, codebook_VZ: Tensor, noise: Noise, config: SampleConfig) -> None:
        self.order, self.codebook_VZ, self.noise, self.config = order, codebook_VZ, noise, config
        self.is_bad = torch.zeros((), dtype=torch.int32, device=codebook_VZ.device)
        self.drawn: list[Tensor] = []
        self.is_fused = codebook_VZ.is_cuda and isinstance(noise, KeyedNoise) and not config.smooth and HAS_TRITON

    def __call__(self, step: int, wanted_BlV: Tensor, unwanted_BlV: Tensor | None, strength: float) -> Tensor:
        """See `Choose`."""
        choose = self._choose_fused if self.is_fused else self._choose
        self.drawn.append(choose(step, wanted_BlV, unwanted_BlV, strength))
        return self.drawn[-1]

    def _choose(self, step: int, wanted_BlV: Tensor, unwanted_BlV: Tensor | None, strength: float) -> Tensor:
        config, (_, length, vocab_size) = self.config, wanted_BlV.shape
        logits_BlV = guide(wanted_BlV, unwanted_BlV, strength)
        self.is_bad |= ~torch.isfinite(logits_BlV).all()
        logits_BlV = truncate(logits_BlV, config.top_k, config.top_p)
        if not config.smooth:
            return self.order.lookup(draw(logits_BlV, self.noise(step, STREAM_CODES, length, vocab_size)))
        progress = step / max(len(self.order.step_lengths) - 1, 1)
        noise_BlV = self.noise(step, STREAM_SMOOTH, length, vocab_size)
        with torch.autocast(logits_BlV.device.type, enabled=False):
            return smooth_vectors(logits_BlV, noise_BlV, self.codebook_VZ, progress)

    def _choose_fused(self, step: int, wanted_BlV: Tensor, unwanted_BlV: Tensor | None, strength: float) -> Tensor:
        from varcli.kernels.draw_triton import draw_codes

        config, noise = self.config, (self.noise.keys_B, salt(step, STREAM_CODES))
        codes = draw_codes(wanted_BlV, unwanted_BlV, *noise, strength, config.top_k, config.top_p, self.is_bad)
        return self.order.lookup(codes)
