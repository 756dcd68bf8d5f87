"""Muon for the matrices of a transformer's blocks and AdamW for all else, as one optimizer.

Muon takes the momentum of a matrix's gradient and replaces it by the nearest orthogonal matrix. It is for matrices between
hidden layers; embeddings, the head, biases and other vectors stay with AdamW. Steps are scaled to the size of AdamW's
(arXiv:2502.16982), so that one learning rate and one weight decay serve both.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from varcli.errors import ConfigError, unknown_name
from varcli.training.optim import build_adamw

OPTIMIZERS = ("adamw", "muon")
"""What a transformer may be trained with."""


class MuonAdamW(Optimizer):
    """Torch's Muon and torch's AdamW, each over groups of its own, with one list of groups and one state.

    found_inf: 0-d on the device, as under GradScaler: where it is 1 a step changes nothing, and nothing waits to know. Muon
    has no kernel that looks at it, so the matrices are copied before a step (4 bytes each, until its end) and put back.
    """

    _step_supports_amp_scaling = True  # whoever steps this may set found_inf instead of looking at the gradients

    def __init__(self, adamw: torch.optim.AdamW, muon: Optimizer) -> None:
        self.adamw, self.muon = adamw, muon
        self.found_inf: Tensor | None = None
        super().__init__([*adamw.param_groups, *muon.param_groups], {})
        self._share()

    def _share(self) -> None:
        """Let both work on this optimizer's groups and state."""
        count = len(self.adamw.param_groups)
        self.adamw.param_groups, self.muon.param_groups = self.param_groups[:count], self.param_groups[count:]
        self.adamw.state = self.muon.state = self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        super().load_state_dict(state_dict)  # which makes new groups and a new state
        self._share()

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Step both, or neither where found_inf is 1."""
        self.adamw.found_inf = self.found_inf
        self.adamw.step()
        if self.found_inf is None:
            self.muon.step()
            return
        bad = self.found_inf > 0
        matrices = [entry for group in self.muon.param_groups for entry in group["params"] if entry.grad is not None]
        before = [matrix.clone() for matrix in matrices]
        for matrix in matrices:
            state = self.state[matrix]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(matrix.grad)
            # momentum on its way to itself stays the same
            matrix.grad.copy_(torch.where(bad, state["momentum_buffer"], matrix.grad))
        self.muon.step()
        for matrix, old in zip(matrices, before, strict=True):
            matrix.copy_(torch.where(bad, old, matrix))


def build_optimizer(name: str, model: nn.Module, undecayed: Collection[str]) -> Optimizer:
    """Return the optimizer `name` for what learns in a transformer; rate and decay come from a Schedule, step by step.

    undecayed: names that weight decay leaves alone. Raises ConfigError for an unknown name, or if there is no matrix for
    Muon to learn.
    """
    if name not in OPTIMIZERS:
        raise unknown_name("optimizer", name, OPTIMIZERS)
    if name == "adamw":
        return build_adamw(model, undecayed)
    matrices = {
        key: entry
        for key, entry in model.named_parameters()
        if key.startswith("blocks.") and entry.ndim == 2 and entry.requires_grad
    }
    if not matrices:
        raise ConfigError("muon learns the blocks' matrices, but the blocks are frozen", "set optimizer=adamw")
    adamw = build_adamw(model, undecayed, without=matrices)
    return MuonAdamW(
        adamw, torch.optim.Muon(matrices.values(), lr=0.0, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    )
