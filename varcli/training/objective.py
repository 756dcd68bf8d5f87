"""What a transformer learns: the cross entropy of every code given all coarser scales, with teacher forcing."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from varcli.devices import autocast, float64_or_best
from varcli.distributed.parallelize import Parallel
from varcli.order.base import Order
from varcli.transformer import Transformer

NUMBERS = ("loss", "loss_last", "accuracy", "accuracy_last")
"""What `measure` returns beside the loss, in this order; "last" is the last step's tokens, the finest scale."""


class Objective:
    """A model and an order: codes and labels to a loss, compiled or not.

    dtype: precision of matrix products. parallel: how the model is called where several processes train it.
    """

    def __init__(
        self,
        model: Transformer,
        order: Order,
        device: torch.device,
        dtype: torch.dtype,
        label_smoothing: float = 0.0,
        parallel: Parallel | None = None,
    ) -> None:
        self.model, self.order, self.device, self.dtype = model, order, device, dtype
        self.parallel = parallel or Parallel(model)
        self.label_smoothing = label_smoothing
        self._measure: Callable[..., tuple[Tensor, Tensor]] = measure
        self._prepare = order.teacher_forcing_input
        self._has_graphs = False

    def compile(self, with_graphs: bool = False) -> None:
        """Let torch.compile fuse the model with its loss from the next call on: all at once for graphs, else in parts."""
        torch.compiler.reset()  # of the programs a function may have, eight, a block takes two for each size of batch
        self.parallel.prepare_compiling()
        if with_graphs:
            self._measure = torch.compile(measure, dynamic=False, mode="reduce-overhead")
        else:
            self.model.compile_parts()
        self._prepare = torch.compile(self.order.teacher_forcing_input, dynamic=False)
        self._has_graphs = with_graphs

    def uncompile(self) -> None:
        """Go back to plain torch."""
        self.model.uncompile_parts()
        self._measure, self._prepare, self._has_graphs = measure, self.order.teacher_forcing_input, False

    def loss(self, codes_BL: Tensor, labels_B: Tensor, branches: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the loss to learn from and (4,) `NUMBERS`. Labels may be num_classes, which is no class.

        branches: (depth, 2, B) factors on residual branches, drawn by `drop_branches`.

        With graphs, the next call overwrites both, and the gradients of this one.
        """
        if self._has_graphs:
            torch.compiler.cudagraph_mark_step_begin()
        with torch.no_grad():
            x_BLZ = self._prepare(codes_BL)
        with autocast(self.device, self.dtype):
            last = self.order.step_lengths[-1]
            inputs = (labels_B, x_BLZ, codes_BL, self.label_smoothing, last, branches)
            return self.parallel(self._measure, *inputs)

    @torch.no_grad()
    def sums_by_step(self, codes_BL: Tensor, labels_B: Tensor) -> tuple[Tensor, Tensor]:
        """Return sums over the batch of each step's mean loss and accuracy, float64: two tensors of one entry a step."""
        # batches of any size, which compiled parts would be compiled for anew; to say so imports the compiler, so not in vain
        is_compiled = self.model.has_compiled_parts
        eager = torch.compiler.set_stance("force_eager") if is_compiled else contextlib.nullcontext()
        with eager, autocast(self.device, self.dtype):
            logits_BLV = self.model(labels_B, self.order.teacher_forcing_input(codes_BL))
        losses_BL = F.cross_entropy(logits_BLV.flatten(0, 1), codes_BL.flatten(), reduction="none").view_as(codes_BL)
        hits_BL = (logits_BLV.argmax(dim=-1) == codes_BL).float()
        steps, wide = self.order.step_lengths, float64_or_best(self.device)
        sums = [
            torch.stack([part.to(wide).mean(dim=1).sum() for part in whole.split(steps, dim=1)])
            for whole in (losses_BL, hits_BL)
        ]
        return sums[0], sums[1]


def measure(
    model: Transformer,
    labels_B: Tensor,
    x_BLZ: Tensor,
    codes_BL: Tensor,
    label_smoothing: float,
    last: int,
    branches: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the loss to learn from, and (4,) numbers: mean loss and accuracy over all tokens, and over the `last` ones.

    The loss is the plain mean cross entropy over tokens; `NUMBERS` are without label smoothing. Source: VAR's trainer.
    """
    loss, losses_BL, hits_BL = model.losses(labels_B, x_BLZ, codes_BL, label_smoothing, branches)
    hits_BL = hits_BL.float()
    numbers = torch.stack([losses_BL.mean(), losses_BL[:, -last:].mean(), hits_BL.mean(), hits_BL[:, -last:].mean()])
    return loss, numbers.detach()
