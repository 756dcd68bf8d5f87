"""One optimizer and all that belongs to a step of it: parameter groups, schedule, clipping, refusal of bad gradients.

How a trainer uses it:

    optimizer = build_adamw(model, undecayed=model.undecayed_parameters())
    updater = Updater(optimizer, Schedule(total_steps=..., learning_rate=...), grad_clip=2.0, ema=ema)

    def train_step(self, step):             # see varcli.training.loop
        updater.begin(step)                 # learning rate and weight decay of this step, gradients cleared
        loss = ...
        updater.backward(loss)              # once a micro-batch
        return {"loss": loss.detach(), **updater.finish(loss.detach())}

Nothing here waits for the device: a step whose gradients are no numbers is skipped by the optimizer's own kernel.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from varcli.distributed import ALONE, World
from varcli.distributed.parallelize import is_shard
from varcli.training.ema import Averages, Ema
from varcli.training.parallel import average_gradients
from varcli.training.schedules import Schedule


def parameter_groups(
    module: nn.Module, undecayed: Collection[str] | None = None, without: Collection[str] = ()
) -> list[dict]:
    """Split a module's trainable parameters for an optimizer: not decayed first, decayed second; empty groups are left out.

    undecayed: names that weight decay leaves alone; None takes biases and all that have fewer than two dimensions.
    without: names that are not this optimizer's.
    """
    kept: list[nn.Parameter] = []
    decayed: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad and name not in without:
            plain = parameter.ndim < 2 or name.endswith("bias")
            alone = plain if undecayed is None else name in undecayed
            (kept if alone else decayed).append(parameter)
    groups = [{"params": kept, "is_decayed": False}, {"params": decayed, "is_decayed": True}]
    return [{**group, "weight_decay": 0.0} for group in groups if group["params"]]


def build_adamw(
    module: nn.Module,
    undecayed: Collection[str] | None = None,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    without: Collection[str] = (),
) -> torch.optim.AdamW:
    """AdamW in one fused kernel over `parameter_groups`; learning rate and decay come from a Schedule, step by step."""
    return torch.optim.AdamW(parameter_groups(module, undecayed, without), lr=0.0, betas=betas, eps=eps, fused=True)


class LossScale:
    """The factor that keeps float16 gradients above zero: halved when they overflow, doubled after a quiet while.

    As torch's GradScaler, but capped (VAR's trainer does so) and read on the device alone.
    """

    def __init__(
        self, device: torch.device, start: float = 2.0**11, interval: int = 1000, largest: float = 2.0**15
    ) -> None:
        self.interval, self.largest = interval, largest
        self.state = torch.tensor([start, 0.0], device=device)  # the factor, and good steps since it last changed

    @property
    def factor(self) -> Tensor:
        """The factor on the loss, 0-d."""
        return self.state[0]

    @torch.no_grad()
    def update(self, overflowed: Tensor) -> Tensor:
        """Adapt to a step that did or did not overflow (0-d, 1 or 0).

        Returns 1 if it did although the factor is at its floor of 1, so that overflow does not explain it; else 0.
        """
        factor, quiet = self.state[0], (self.state[1] + 1) * (1 - overflowed)
        unexplained = overflowed * (factor <= 1)
        grown = torch.where(quiet >= self.interval, (factor * 2).clamp(max=self.largest), factor)
        self.state[0] = torch.where(overflowed > 0, (factor / 2).clamp(min=1.0), grown)
        self.state[1] = torch.where(quiet >= self.interval, torch.zeros_like(quiet), quiet)
        return unexplained


class Updater:
    """Steps one optimizer along its schedule, after clipping; skips a step whose loss or gradients are no numbers.

    A skipped step leaves weights, moments and the average of weights as they were.
    grad_clip: largest global gradient norm; None turns clipping off. loss_scale: for float16, else None. world: processes
    that each have the gradients of a part of the batch, which are averaged first.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        schedule: Schedule,
        *,
        grad_clip: float | None = None,
        ema: Ema | Averages | None = None,
        loss_scale: LossScale | None = None,
        world: World = ALONE,
    ) -> None:
        self.world = world
        self.optimizer, self.schedule, self.grad_clip = optimizer, schedule, grad_clip
        self.ema, self.loss_scale = ema, loss_scale
        self.parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self.skipped = torch.zeros((), device=self.parameters[0].device)
        self.skips_on_device = getattr(optimizer, "_step_supports_amp_scaling", False)
        if self.skips_on_device:
            optimizer.found_inf = self.skipped  # the fused kernel does nothing where this is 1, as under GradScaler
        self.step = 0

    def begin(self, step: int) -> None:
        """Set the optimizer for step `step`, counted from 0, and clear the gradients."""
        self.step = step
        learning_rate, weight_decay = self.schedule.learning_rate_at(step), self.schedule.weight_decay_at(step)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
            group["weight_decay"] = weight_decay if group.get("is_decayed", True) else 0.0
        self.optimizer.zero_grad(set_to_none=True)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a loss; of several micro-batches, pass each one's share of the mean."""
        (loss if self.loss_scale is None else loss * self.loss_scale.factor).backward()

    @torch.no_grad()
    def finish(self, loss: Tensor) -> Mapping[str, Tensor | float]:
        """Clip and step. loss: 0-d, of the whole batch, all processes' parts. Returns numbers for the log.

        "gradient_norm" is the norm before clipping; "skipped" is 1 if the step was refused and no float16 overflow
        explains it; "learning_rate" is a float.
        """
        average_gradients(self.parameters, self.world)
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        if self.loss_scale is not None:
            torch._foreach_mul_(gradients, 1 / self.loss_scale.factor)
        norm = torch.nn.utils.get_total_norm(gradients)
        norm = norm.full_tensor() if is_shard(norm) else norm
        is_good = torch.isfinite(norm) & torch.isfinite(loss)
        self.skipped.copy_(~is_good)
        if self.grad_clip is not None:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.grad_clip, norm)
        if self.skips_on_device or not self.skipped:
            self.optimizer.step()
        if self.ema is not None:
            self.ema.update(self.step, self.skipped)
        skipped = self.skipped.clone() if self.loss_scale is None else self.loss_scale.update(self.skipped)
        learning_rate = self.optimizer.param_groups[-1]["lr"]
        return {"gradient_norm": norm, "skipped": skipped, "learning_rate": learning_rate}
