"""Next-scale prediction: one step is one token map, coarse to fine. Source: VAR, arXiv:2404.02905."""

from __future__ import annotations

import torch
from torch import Tensor

from varcli.tokenizer.quantizer import MultiScaleQuantizer


class ScaleOrder:
    """One step a scale; the state is the running f_hat, of which the next step reads a shrunken copy."""

    def __init__(self, quantizer: MultiScaleQuantizer) -> None:
        self.quantizer = quantizer
        self.step_lengths = quantizer.scales.step_lengths

    @property
    def seq_len(self) -> int:
        """L, the tokens of all scales."""
        return sum(self.step_lengths)

    def teacher_forcing_input(self, codes_BL: Tensor) -> Tensor:
        """Features (B, L - l_0, Z), float32; see `MultiScaleQuantizer.teacher_forcing_input`."""
        return self.quantizer.teacher_forcing_input(codes_BL)

    def lookup(self, codes_Bl: Tensor) -> Tensor:
        """Code vectors (B, l, Z) of codes in [0, V)."""
        return self.quantizer.lookup(codes_Bl)

    def start(self, batch: int, device: torch.device) -> Tensor:
        """The empty f_hat (B, Z, h, w)."""
        return self.quantizer.empty_f_hat(batch, device)

    def advance(self, state: Tensor, step: int, vectors_BlZ: Tensor) -> tuple[Tensor, Tensor | None]:
        """Add scale `step` to f_hat; return it and its copy at the next scale's size, or None after the last."""
        return self.quantizer.advance(state, vectors_BlZ, step)

    def finish(self, state: Tensor) -> Tensor:
        """f_hat (B, Z, h, w) of the scales so far."""
        return state
