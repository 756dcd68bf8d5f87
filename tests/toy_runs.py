"""Runs of `train_transformer` that take a second: settings, the call, its trainer, losses, and an interruption."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import torch

from varcli.data.codes import CodesCache
from varcli.tokenizer.store import load_tokenizer
from varcli.training import TrainConfig, train_transformer
from varcli.training.runlog import read_log
from varcli.training.source import CodesSource
from varcli.training.transformer_trainer import TransformerTrainer

TINY = TrainConfig(
    depth=2,
    width=32,
    num_heads=2,
    steps=12,
    batch_size=8,
    micro_batch_size=5,
    warmup_steps=2,
    learning_rate=3e-3,
    schedule="lin0",
    final_learning_rate=0.1,
    weight_decay=0.05,
    final_weight_decay=0.05,
    dropout=0.1,
    drop_path=0.1,
    shared_adaln=False,
    ema_decay=0.9,
    keep_best=False,
    precision="fp32",
    log_every=1,
    validate_every=5,
    sample_every=0,
    save_every=4,
    tensorboard=False,
)


def train(codes: Path, out: Path, tokenizer: Path, config: TrainConfig = TINY, **options):
    return train_transformer(codes, out, config, tokenizer=tokenizer, device="cpu", **options)


def make_trainer(codes: Path, tokenizer: Path, config: TrainConfig) -> TransformerTrainer:
    """A trainer that nothing was tried out with yet."""
    cpu, cache = torch.device("cpu"), CodesCache.open(codes)
    source = CodesSource(cache.load("train"), config.batch_size, config.seed, cpu)
    held_out = CodesSource(cache.load("val"), config.batch_size, config.seed, cpu)
    return TransformerTrainer(config, load_tokenizer(tokenizer), source, held_out, classes=cache.classes, device=cpu)


def losses(run: Path) -> list[tuple]:
    return [(line["step"], line["loss"].hex(), line["gradient_norm"].hex()) for line in read_log(run, "train")]


class StopAfter:
    """An on_step that interrupts a run, which reports each step, so that it ends with this one: 2 or a later one.

    The signal comes with the report of the step before, by when all have agreed on what follows that.
    """

    def __init__(self, step: int) -> None:
        self.step = step

    def __call__(self, report) -> None:
        if report.done == self.step - 1 and report.values and self.step:
            self.step = 0
            os.kill(os.getpid(), signal.SIGTERM)
