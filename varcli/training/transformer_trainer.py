"""The trainer of a transformer: its model, optimizer and data, plugged into the shared loop."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from varcli.artifacts.write import atomic_folder
from varcli.devices import resolve_precision
from varcli.distributed import ALONE, World
from varcli.distributed.context import exchange
from varcli.distributed.parallelize import parallelize
from varcli.errors import ConfigError
from varcli.kernels import resolve_kernels
from varcli.kernels.fp8 import require_fp8
from varcli.order import ScaleOrder
from varcli.progress import OnStep, ignore
from varcli.tokenizer import VQVAE
from varcli.training.ema import Averages, Ema
from varcli.training.evaluated import EvaluatedModel
from varcli.training.frozen import learn
from varcli.training.muon import build_optimizer
from varcli.training.objective import NUMBERS, Objective
from varcli.training.optim import LossScale, Updater
from varcli.training.parallel import share_batch
from varcli.training.plan import (
    TrainPlan,
    activation_bytes,
    choose_mode,
    coming_bytes,
    fit_micro_batch,
    memory_hint,
)
from varcli.training.prepare import prepare
from varcli.training.settings import TrainConfig
from varcli.training.source import CodesSource
from varcli.training.state import Parts
from varcli.training.trainer import Trainer
from varcli.training.transformer_parent import TransformerParent, begin
from varcli.transformer import Transformer, drop_branches, drop_labels
from varcli.transformer.store import KIND, save_transformer

_COMPILE_FROM = 500  # optimizer steps that make up for the minute of compiling


@dataclass(frozen=True, kw_only=True)
class SampleRequest:
    """What a picture of a run's state is drawn with: the weights that would be sampled from now, in eval mode."""

    step: int  # optimizer steps done
    transformer: Transformer
    tokenizer: VQVAE
    classes: tuple[str, ...]  # names by index
    source: str | None = None  # the images the codes were made of, as the cache names them


OnSamples = Callable[[SampleRequest], Image.Image | None]
OnEvaluate = Callable[[SampleRequest, int], Mapping[str, float]]
"""Called with the number of images to draw; returns metrics by name."""


class TransformerTrainer(Trainer):
    """Next-scale prediction with teacher forcing.

    config: resolved. source, validation: what to learn from and to measure on; None holds nothing out. classes: names
    by index. on_samples: draws pictures. on_evaluate: measures samples, of images that
    learned from `images`. on_step: told if torch.compile has to be left out. parent: what the weights start from. world:
    the processes that share every batch. What is drawn at random is drawn for the whole batch by all of them alike (but
    for `dropout`), so that their number changes nothing but the time.
    """

    published = KIND

    def __init__(
        self,
        config: TrainConfig,
        tokenizer: VQVAE,
        source: CodesSource,
        validation: CodesSource | None,
        *,
        classes: tuple[str, ...],
        device: torch.device,
        on_samples: OnSamples | None = None,
        on_evaluate: OnEvaluate | None = None,
        images: str | None = None,
        on_step: OnStep = ignore,
        parent: TransformerParent | None = None,
        world: World = ALONE,
    ) -> None:
        self.world, self.share_size = world, share_batch(config.batch_size, world)
        self.config, self.tokenizer, self.source, self.validation = config, tokenizer, source, validation
        self.classes, self.device, self.on_samples, self.on_step = classes, device, on_samples, on_step
        self.on_evaluate, self.images = on_evaluate, images
        self.batch_size = config.batch_size
        self.order = ScaleOrder(tokenizer.quantizer)
        self.model_config = config.transformer(
            step_lengths=self.order.step_lengths,
            vocab_size=tokenizer.config.vocab_size,
            code_channels=tokenizer.config.code_channels,
            num_classes=len(classes),
        )
        torch.manual_seed(config.seed)
        # drawn on the CPU, so that a seed means the same weights on every device
        self.model = Transformer(self.model_config)
        self.frozen, self.start_notes = begin(self.model, parent, config.frozen, classes, tokenizer.fingerprint())
        self.model.to(device)
        learn(self.model, self.frozen)
        # graphs take the whole model compiled as one, which torch 2.11 does not end with for our operators
        is_open = config.cuda_graphs and config.kernels == "auto"
        self.model.kernels = resolve_kernels("torch" if is_open else config.kernels, device)
        self.dtype = resolve_precision(config.precision, device)
        if config.fp8:
            require_fp8(device, self.dtype, self.model_config.width, self.model_config.hidden_width)
            self.model.train_in_fp8()
        self.is_compiled = self._wants_compile()
        needed = coming_bytes(self.model.num_parameters, len(config.all_ema_decays)) + self.image_bytes()
        self.mode = choose_mode(config.parallel, config.optimizer, needed, device, world)
        self.parallel = parallelize(self.model, self.model.blocks, world, self.mode, device, self.dtype)
        self.averages = Averages(self.model, config.all_ema_decays, config.best_average)
        self.generator = torch.Generator(device).manual_seed(config.seed)
        loss_scale = LossScale(device) if self.dtype == torch.float16 else None
        self.updater = Updater(
            build_optimizer(config.optimizer, self.model, self.model.undecayed_parameters()),
            config.optimizer_schedule(),
            grad_clip=config.grad_clip,
            ema=self.averages,
            loss_scale=loss_scale,
        )
        further = [f"{KIND}-{decay:.6g}" for decay in config.ema_decays]
        self.parts = Parts(
            modules={KIND: self.model},
            optimizers={KIND: self.updater.optimizer},
            averages=dict(zip([KIND, *further], self.averages.members, strict=False)),
            generators={"labels": self.generator},
            loss_scales={KIND: loss_scale} if loss_scale else {},
        )
        self.objective = Objective(self.model, self.order, device, self.dtype, config.label_smoothing, self.parallel)
        self.evaluated = EvaluatedModel(self.parallel, self.averages, self.frozen, world)
        self.micro_batch_size = self._choose_micro_batch()
        if self.is_compiled:
            self.objective.compile(with_graphs=self._wants_graphs())

    @property
    def memory_hint(self) -> str:
        """What to change when memory runs out."""
        can_shard = self.world.size > 1 and not self.parallel.is_sharded and self.config.optimizer == "adamw"
        return memory_hint(self.micro_batch_size, self.config.precision, can_shard)

    @property
    def average(self) -> Ema | None:
        """The average whose weights are sampled from, None if there is none."""
        return self.averages.average

    # -- what the loop calls -------------------------------------------------------------------------------------

    def train_step(self, step: int) -> Mapping[str, Tensor | float]:
        """One optimizer step on batch `step`, in micro-batches; see `Trainer.train_step`."""
        codes_BL, labels_B = self.source.batch(step)
        # drawn for the whole batch, so that cutting it up does not change what is dropped
        rate = self.config.label_dropout
        labels_B = drop_labels(labels_B, self.model_config.num_classes, rate, self.generator)
        branches = drop_branches(self.model_config, len(codes_BL), self.generator, self.device)
        if self.model_config.dropout and self.world.size > 1:  # drawn by each process for its part, as nothing else is
            torch.manual_seed((self.config.seed + step * self.world.size + self.world.rank) % 2**63)
        self.updater.begin(step)
        total = torch.zeros(len(NUMBERS), device=self.device)
        first = self.world.rank * self.share_size
        end = first + self.share_size
        for start in range(first, end, self.micro_batch_size):
            piece = slice(start, min(start + self.micro_batch_size, end))
            codes, labels = codes_BL[piece], labels_B[piece]
            share = len(codes) / self.share_size
            with exchange(and_more=True), self.parallel.accumulating(is_last=piece.stop == end):
                loss, numbers = self.objective.loss(codes, labels, None if branches is None else branches[:, :, piece])
                self.updater.backward(loss * share)
            total += numbers * share
        values = dict(zip(NUMBERS, self.world.mean(total).unbind(), strict=True))
        epoch = (step + 1) * self.batch_size / self.source.num_images
        return {**values, **self.updater.finish(values["loss"]), "epoch": epoch}

    @torch.no_grad()
    def validate(self) -> Mapping[str, Any]:
        """Loss and accuracy on held-out images, whole and by scale, no label dropped, of the weights to sample from.

        Of several averages each one's loss is there too.
        """
        if self.validation is None:
            return {}
        averages = self.averages
        if len(averages.members) < 2:
            return self._measure(self.average)
        found = [self._measure(average) for average in averages.members]
        averages.losses.copy_(torch.tensor([values["loss"] for values in found], dtype=torch.float64))
        pairs = zip(averages.members, found, strict=True)
        return {
            **found[averages.chosen],
            **{f"loss_ema_{member.decay:.6g}": values["loss"] for member, values in pairs},
        }

    def remember(self) -> dict[str, Any]:
        """Which averages were how good, if there are several, None for no finite loss; see `Trainer.remember`."""
        losses = [loss if math.isfinite(loss) else None for loss in self.averages.losses.tolist()]
        return {"average_losses": losses} if len(losses) > 1 else {}

    def recall(self, remembered: Mapping[str, Any]) -> None:
        """Take over what `remember` returned; averages that it does not know have no loss yet."""
        losses = [math.inf if loss is None else loss for loss in remembered.get("average_losses", [])]
        if len(losses) == len(self.averages.losses):
            self.averages.losses.copy_(torch.tensor(losses, dtype=torch.float64))

    def _measure(self, average: Ema | None) -> dict[str, Any]:
        count = 0
        sums = torch.zeros(2, len(self.order.step_lengths), dtype=torch.float64)
        with self.evaluated.weights(average) as model:
            objective = Objective(model, self.order, self.device, self.dtype)
            for codes, labels in self.validation.all_rows(self.micro_batch_size, self.config.validation_images):
                sums += torch.stack(objective.sums_by_step(codes, labels)).cpu()
                count += len(codes)
        lengths = torch.tensor(self.order.step_lengths, dtype=torch.float64)
        by_scale = sums.cpu() / count
        means = (by_scale * lengths).sum(dim=1) / lengths.sum()
        return {
            "loss": means[0].item(),
            "loss_last": by_scale[0, -1].item(),
            "accuracy": means[1].item(),
            "accuracy_last": by_scale[1, -1].item(),
            "loss_by_scale": by_scale[0].tolist(),
            "accuracy_by_scale": by_scale[1].tolist(),
            "images": count,
        }

    def publish(self, folder, info: Mapping[str, Any]) -> None:
        """Write the weights to sample from, averaged if there is an average, as a transformer folder."""
        described = {
            "tokenizer": self.tokenizer.fingerprint(),
            "patch_nums": list(self.tokenizer.config.patch_nums),
            "order": "scale",
            "classes": list(self.classes),
            "averaged": self.average is not None,
            "ema_decay": self.average.decay if self.average is not None else None,
            **info,
        }
        with self.evaluated.weights() as model, atomic_folder(folder) as temporary:
            save_transformer(temporary, model, described)

    @torch.no_grad()
    def draw(self, step: int) -> Image.Image | None:
        """Let the caller's hook draw with the weights to sample from."""
        if self.on_samples is None:
            return None
        with self.evaluated.weights() as model:
            return self.on_samples(self._request(step, model))

    @torch.no_grad()
    def evaluate(self, step: int) -> Mapping[str, float]:
        """Let the caller's hook measure samples of the weights to sample from."""
        if self.on_evaluate is None:
            return {}
        with self.evaluated.weights() as model:
            return self.on_evaluate(self._request(step, model), self.config.eval_samples)

    def _request(self, step: int, model: Transformer) -> SampleRequest:
        return SampleRequest(
            step=step,
            transformer=model,
            tokenizer=self.tokenizer,
            classes=self.classes,
            source=self.images,
        )

    def describe_batch(self, step: int) -> dict[str, Any]:
        """Rows of the codes cache's training split that step `step` took."""
        rows = self.source.rows(step * self.batch_size, self.batch_size)
        return {"seed": self.config.seed, "rows": rows[:4096].tolist()}

    def assembled(self) -> AbstractContextManager[None]:
        """See `Trainer.assembled`."""
        return self.evaluated.assembled()

    # -- before the start ----------------------------------------------------------------------------------------

    def prepare(self, start_step: int) -> TrainPlan:
        """Find out what the run will take, before it starts; see `varcli.training.prepare.prepare`."""
        plan = prepare(self, start_step)
        self.planned_seconds = plan.seconds / max(plan.steps - start_step, 1)
        self.planned_bytes = plan.memory_bytes
        return plan

    def checkpoint_bytes(self) -> int:
        """Size of one checkpoint: weights, two moments, and averages."""
        return self.model.num_parameters * (12 + 4 * len(self.averages.members))

    def _wants_compile(self) -> bool:
        if self.config.compile is not None:
            return self.config.compile
        return self.device.type == "cuda" and self.config.steps >= _COMPILE_FROM

    def _wants_graphs(self) -> bool:
        wanted = self.config.cuda_graphs and self.device.type == "cuda"
        if wanted and self.world.size > 1:
            raise ConfigError("cuda_graphs is for one process", "set cuda_graphs=false")
        if wanted and self.micro_batch_size < self.batch_size:
            raise ConfigError(
                "cuda_graphs replays one piece a step, but the batch is cut into several",
                f"set micro_batch_size={self.batch_size}, or cuda_graphs=false",
            )
        return wanted

    def _choose_micro_batch(self) -> int:
        if self.config.micro_batch_size is not None:
            return min(self.config.micro_batch_size, self.share_size)
        fitting = fit_micro_batch(self.share_size, self.image_bytes(), self._fixed_bytes(), self.device)
        return -self.world.largest(-fitting)[0]  # shards meet in each micro-batch, so all must have the same number

    def image_bytes(self) -> int:
        """Estimate of what one image needs between forward and backward."""
        return activation_bytes(self.model_config, self.dtype, self.is_compiled, self.model.kernels)

    def _fixed_bytes(self) -> int:
        coming = coming_bytes(self.model.num_parameters)  # weights and averages are there
        if not self.parallel.is_sharded:
            return coming
        # beside its shard, a process holds what is outside of the blocks, and two blocks and their gradients at a time
        block = sum(parameter.numel() for parameter in self.model.blocks[0].parameters())
        outside = self.model.num_parameters - len(self.model.blocks) * block
        return coming // self.parallel.num_shards + 8 * outside + 2 * 8 * block
