"""The model that validation, pictures and publishing look at: with the weights to sample from, in eval mode, and whole."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from varcli.distributed import World
from varcli.distributed.parallelize import Parallel, gather_whole
from varcli.training.ema import Averages, Ema
from varcli.training.frozen import learn
from varcli.transformer import Transformer


class EvaluatedModel:
    """A transformer in training, seen from outside.

    parallel: the model that learns. frozen: its modules that do not. With shards the first process alone sees it, as a
    whole copy: within `assembled` on the CPU, within `weights` on the device too.
    """

    def __init__(self, parallel: Parallel, averages: Averages, frozen: Sequence[nn.Module], world: World) -> None:
        self.parallel, self.averages, self.frozen, self.world = parallel, averages, frozen, world
        self._whole: dict[Ema | None, dict[str, Tensor] | None] = {}

    @contextmanager
    def assembled(self) -> Iterator[None]:
        """Put shards together, tensor by tensor, for a while; see `Trainer.assembled`."""
        if self.parallel.is_sharded:
            for average in self.averages.members or (None,):
                weights = self.parallel.model.state_dict() if average is None else average.tensors()
                self._whole[average] = gather_whole(weights, self.world)
        try:
            yield
        finally:
            self._whole.clear()

    @contextmanager
    def weights(self, average: Ema | None = None) -> Iterator[Transformer]:
        """The model with the weights of an average, by default of the one that counts, for a while."""
        average, model = average or self.averages.average, self.parallel.model
        if self.parallel.is_sharded:
            device = next(model.parameters()).device
            with torch.device("meta"):
                whole = Transformer(model.config)
            whole.load_state_dict(self._whole[average], assign=True)
            whole.kernels = model.kernels
            yield whole.to(device).eval().requires_grad_(False)
            return
        model.eval()
        try:
            with average.swapped() if average is not None else nullcontext():
                yield model
        finally:
            learn(model, self.frozen)
