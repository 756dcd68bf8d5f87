"""A trainer small enough to kill a hundred times: a linear model on random numbers that depend on the step."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import torch
from torch import nn

from varcli.artifacts.manifest import write_manifest
from varcli.artifacts.write import atomic_folder, write_tensors
from varcli.progress import OnStep, ignore
from varcli.training.ema import Ema
from varcli.training.loop import LoopConfig, LoopResult, run_training
from varcli.training.optim import Updater, build_adamw
from varcli.training.run import open_run
from varcli.training.schedules import Schedule
from varcli.training.state import Parts
from varcli.training.trainer import Trainer


class ToyTrainer(Trainer):
    """Dropout from torch's own random source, noise from a generator, an average, and losses spoilt on demand."""

    batch_size = 4
    published = "toy"

    def __init__(self, steps: int, spoilt: tuple[int, ...] = (), width: int = 3) -> None:
        for seed in (random.seed, np.random.seed, torch.manual_seed):  # all that a checkpoint holds
            seed(0)
        self.model = nn.Sequential(nn.Linear(5, width), nn.Dropout(0.5), nn.Linear(width, 1))
        self.average = Ema(self.model, 0.9)
        self.generator = torch.Generator().manual_seed(1)
        optimizer = build_adamw(self.model)
        schedule = Schedule(total_steps=steps, learning_rate=0.05, warmup_steps=2)
        self.updater = Updater(optimizer, schedule, grad_clip=1.0, ema=self.average)
        self.spoilt = spoilt
        self.parts = Parts(
            modules={"toy": self.model},
            optimizers={"toy": optimizer},
            averages={"toy": self.average},
            generators={"noise": self.generator},
        )

    def train_step(self, step):
        self.updater.begin(step)
        x = torch.randn(self.batch_size, 5, generator=torch.Generator().manual_seed(step))
        loss = (self.model(x) - torch.randn(self.batch_size, 1, generator=self.generator)).square().mean()
        if step in self.spoilt:
            loss = loss * float("nan")
        self.updater.backward(loss)
        return {"loss": loss.detach(), **self.updater.finish(loss.detach())}

    def validate(self):
        with self.average.swapped():
            self.model.eval()
            loss = self.model(torch.ones(1, 5)).square().mean().item()
            self.model.train()
        return {"loss": loss, "noise": torch.rand(()).item()}  # the draw must not move training's

    def publish(self, folder, info):
        with atomic_folder(folder) as temporary:
            write_tensors(temporary / "weights.safetensors", self.average.tensors())
            write_manifest(temporary, "toy", info, files=["weights.safetensors"])

    def describe_batch(self, step):
        return {"samples": [step]}


def train_toy(
    out: Path,
    steps: int = 20,
    resume: str = "auto",
    trainer: Trainer | None = None,
    on_step: OnStep = ignore,
    **loop,
) -> LoopResult:
    """Train for `steps`, going on from what is in `out`."""
    loop = {"log_every": 1, "validate_every": 7, "save_every": 5, "tensorboard": False, **loop}
    with open_run(out, resume) as run:
        run.settle("toy", {"steps": steps, "width": 3}, {}, free=LoopConfig.FREE)
        return run_training(trainer or ToyTrainer(20), run, LoopConfig(steps=steps, **loop), on_step)
