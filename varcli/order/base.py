"""What every generation order is: it prepares what the transformer reads, in training and step by step."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from varcli.tokenizer.quantizer import MultiScaleQuantizer


class Order(Protocol):
    """Codes of earlier steps to the features of the next one. B images, l tokens of a step, L of all, Z channels.

    Law: walking `start`, `advance`, ... with the true codes' vectors gives, piece by piece, `teacher_forcing_input`.
    """

    step_lengths: tuple[int, ...]

    def __init__(self, quantizer: MultiScaleQuantizer) -> None: ...

    @property
    def seq_len(self) -> int:
        """L, the tokens of all steps."""

    def teacher_forcing_input(self, codes_BL: Tensor) -> Tensor:
        """Features (B, L - l_0, Z), float32, read while learning every step but the first."""

    def lookup(self, codes_Bl: Tensor) -> Tensor:
        """Code vectors (B, l, Z) of codes in [0, V)."""

    def start(self, batch: int, device: torch.device) -> Any:
        """The state before the first step."""

    def advance(self, state: Any, step: int, vectors_BlZ: Tensor) -> tuple[Any, Tensor | None]:
        """Take in the vectors of step `step`; return the new state and the next step's features (B, l_next, Z).

        The features are None after the last step. Vectors need not be code vectors: smooth sampling blends them.
        """

    def finish(self, state: Any) -> Tensor:
        """The feature map f_hat (B, Z, h, w), float32, of the steps taken in so far, for the tokenizer's decoder."""
