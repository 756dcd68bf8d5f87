"""Running averages of a module's weights, which often draw better than the weights themselves."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from varcli.errors import ArtifactError, ConfigError


class Ema:
    """Exponential moving average of a module's parameters, float32, on their device.

    The decay rises as (1 + n) / (10 + n) over the first n updates, so that a short run is not averaged with its start.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ConfigError(f"an EMA's decay must be in [0, 1), but is {decay}", "e.g. 0.999, or none to turn it off")
        self.module = module
        self.decay = decay
        self.shadow = {name: parameter.detach().float().clone() for name, parameter in module.named_parameters()}

    @torch.no_grad()
    def update(self, step: int, skipped: Tensor | None = None) -> None:
        """Move towards the module's weights after step `step`, counted from 0.

        skipped: 0-d, 1 if that step changed nothing, so the average must not move either; read on the device.
        """
        share = 1 - min(self.decay, (1 + step) / (10 + step))
        averages = list(self.shadow.values())
        change = torch._foreach_sub([parameter.float() for parameter in self.module.parameters()], averages)
        if skipped is None:
            torch._foreach_add_(averages, change, alpha=share)
        else:
            torch._foreach_mul_(change, (1 - skipped) * share)
            torch._foreach_add_(averages, change)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Put the average in the module's place for a while, e.g. to validate; the weights come back bit for bit."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        # contents, not storage: compiled code and CUDA graphs hold on to the addresses
        for name, parameter in self.module.named_parameters():
            kept = parameter.detach().clone()
            parameter.copy_(self.shadow[name])
            self.shadow[name].copy_(kept)

    def tensors(self) -> dict[str, Tensor]:
        """The averages by parameter name, for a checkpoint."""
        return dict(self.shadow)

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `tensors` returned earlier. Raises ArtifactError if names or shapes differ."""
        for name, average in self.shadow.items():
            if name not in tensors or tensors[name].shape != average.shape:
                raise ArtifactError(f"the stored average of weights has no fitting `{name}`")
            average.copy_(tensors[name])


class Averages:
    """Several averages of one module, the first of which counts, or none.

    take_best: let that with the lowest of `losses` count instead. losses: of the averages' last validation, not a number
    before it.
    """

    def __init__(self, module: nn.Module, decays: Sequence[float], take_best: bool = False) -> None:
        self.members = tuple(Ema(module, decay) for decay in decays)
        self.take_best = take_best
        self.losses = torch.full((len(self.members),), math.nan, dtype=torch.float64)

    @property
    def chosen(self) -> int:
        """Index of the average that counts."""
        if not (self.take_best and self.members):
            return 0
        return int(self.losses.nan_to_num(nan=math.inf, posinf=math.inf).argmin())

    @property
    def average(self) -> Ema | None:
        """The average that counts, None if there is none."""
        return self.members[self.chosen] if self.members else None

    def update(self, step: int, skipped: Tensor | None = None) -> None:
        """Let each move as `Ema.update` does."""
        for member in self.members:
            member.update(step, skipped)
