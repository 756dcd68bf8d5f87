"""Training the multi-scale tokenizer on images: the one call behind `varcli train-tokenizer`."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from varcli import config as configs
from varcli.artifacts.write import atomic_folder
from varcli.data.batches import ShuffledOrder
from varcli.data.defaults import default_decode
from varcli.data.images import ImageTree, decode_images, open_images, typical_side
from varcli.data.samples import make_grid
from varcli.devices import precision_name, resolve_device, resolve_precision
from varcli.errors import DataError
from varcli.progress import OnStep, Step, ignore
from varcli.tokenizer import TokenizerConfig
from varcli.tokenizer.health import count_codes, restart_dead_codes
from varcli.tokenizer.initialize import init_codebook
from varcli.tokenizer.judge import evaluate_tokenizer, scale_strip
from varcli.tokenizer.store import KIND, save_tokenizer
from varcli.training.ema import Ema
from varcli.training.loop import LoopConfig, OnValidation, Trainer, run_training
from varcli.training.optim import Updater, build_adamw
from varcli.training.run import keep_stored, open_run
from varcli.training.schedules import Schedule
from varcli.training.state import Parts
from varcli.training.tokenizer_health import collapse_warnings
from varcli.training.tokenizer_objective import (
    TokenizerObjective,
    TokenizerTrainConfig,
    adversarial_share,
    augment,
    draw_kept_scales,
)

_FREE = LoopConfig.FREE - {"steps"} | {"lpips_weights"}  # a known file, wherever it lies
_USAGE_DECAY = 0.99  # of the running counts that say which codes are dead
_DEAD_SHARE = 0.02  # of a code's fair share of the picks, below which it is dead
_STRIP_IMAGES = 16  # held-out images in the pictures of a run
_INIT_IMAGES = 512  # whose features a codebook begins with
_MEASURED_IMAGES = 1024  # of the training images, that validation takes where none are held out
_MAX_BYTES = 8 * 2**30  # decoded images are kept in memory up to this size


@dataclass(frozen=True, kw_only=True)
class TokenizerTrainResult:
    """What a finished run came to."""

    folder: Path  # the run folder; the tokenizer itself is in its `tokenizer/`
    step: int  # optimizer steps done
    seconds: float  # spent training, over all resumptions
    validation: dict[str, Any] = field(default_factory=dict)  # the last one of this call


class TokenizerTrainer(Trainer):
    """Reconstruction, quantizer and a late discriminator, plugged into the shared loop.

    images, held_out: uint8 (N, 3, H, W) on `device`; if held_out is empty, validation takes images of training.
    """

    published = KIND
    shown = ("loss", "psnr", "codebook_used", "codes_restarted")
    numeric_hint = (
        "start anew with a lower learning rate (--lr), --precision fp32, or a lower --set discriminator_learning_rate if "
        "the discriminator was at work"
    )

    def __init__(self, config: TokenizerTrainConfig, images: Tensor, held_out: Tensor, device: torch.device) -> None:
        torch.manual_seed(config.seed)
        self.config, self.images, self.held_out, self.device = config, images, held_out, device
        self.measured = held_out if len(held_out) else _spread(images, _MEASURED_IMAGES)
        self.batch_size = config.batch_size
        self.order = ShuffledOrder(len(images), config.seed)
        self.generator = torch.Generator(device).manual_seed(config.seed)
        self.objective = TokenizerObjective(config, device, resolve_precision(config.precision, device))
        self.model = self.objective.tokenizer.train()
        self.average = Ema(self.model, config.ema_decay)
        schedule = Schedule(
            total_steps=config.steps,
            learning_rate=config.learning_rate,
            shape="cos",
            warmup_steps=min(config.warmup_steps, config.steps // 4),
            final=config.final_learning_rate,
            weight_decay=0.0,
        )
        # beta2 as of GANs: the codebook's and the discriminator's gradients change fast
        self.updater = Updater(
            build_adamw(self.model, betas=(0.9, 0.99)), schedule, grad_clip=config.grad_clip, ema=self.average
        )
        modules: dict[str, torch.nn.Module] = {KIND: self.model}
        optimizers = {KIND: self.updater.optimizer}
        self.judge: Updater | None = None
        if self.objective.discriminator is not None:
            constant = Schedule(
                total_steps=config.steps,
                learning_rate=config.discriminator_learning_rate,
                shape="constant",
                weight_decay=0.0,
            )
            self.judge = Updater(build_adamw(self.objective.discriminator, betas=(0.5, 0.9)), constant)
            modules |= {"discriminator": self.objective.discriminator, "lecam": self.objective.lecam}
            optimizers["discriminator"] = self.judge.optimizer
        self.parts = Parts(
            modules=modules,
            optimizers=optimizers,
            averages={KIND: self.average},
            generators={"batches": self.generator},
        )

    def train_step(self, step: int) -> Mapping[str, Tensor | float]:
        """One step of the tokenizer and, once it learns, one of the discriminator; see `Trainer.train_step`."""
        config = self.config
        if step == 0 and config.codebook_init == "data":
            self._init_codebook()
        picks = torch.as_tensor(self.order.indices(step * config.batch_size, config.batch_size), device=self.device)
        images = augment(self.images[picks], config, self.generator)
        kept = draw_kept_scales(len(images), config, self.generator, self.device)
        share = adversarial_share(step, config)
        self.updater.begin(step)
        numbers, reconstructions, codes = self.objective.backward_tokenizer(images, kept, share, self.generator)
        loss = numbers["pixel_loss"] + numbers["quantizer_loss"]
        numbers = {"loss": loss, **numbers, **self.updater.finish(loss)}
        if self.judge is not None and step >= 0.8 * config.adversarial_start * config.steps:
            self.judge.begin(step)
            numbers |= self.objective.backward_discriminator(step, images, reconstructions, self.generator)
            judged = self.judge.finish(numbers["discriminator_loss"])
            numbers["discriminator_gradient_norm"] = judged["gradient_norm"]
            numbers["skipped"] = torch.maximum(numbers["skipped"], judged["skipped"])
        numbers["codes_restarted"] = float(self._keep_codes_alive(step, images, codes))
        return numbers

    @torch.no_grad()
    def _init_codebook(self) -> None:
        """Put the codebook where the features of some images are, before the first step."""
        images = _spread(self.images, max(_INIT_IMAGES, self.batch_size))
        chunks = [self.model.features(chunk.float() / 127.5 - 1) for chunk in images.split(self.batch_size)]
        init_codebook(self.model.quantizer, torch.cat(chunks), self.generator)
        self.average.shadow["quantizer.codebook.weight"].copy_(self.model.quantizer.codebook.weight)

    @torch.no_grad()
    def _keep_codes_alive(self, step: int, images: Tensor, codes_BL: Tensor) -> int:
        """Count the picks of this step; now and then move codes nobody picks onto what the batch left over."""
        config, quantizer = self.config, self.model.quantizer
        counts = count_codes(codes_BL, quantizer.scales, quantizer.vocab_size)
        quantizer.usage_KV.lerp_(counts, 1 - _USAGE_DECAY)
        every = config.restart_every
        if not every or (step + 1) % every or step > config.restart_until * config.steps:
            return 0
        usage_V = quantizer.usage_KV.sum(dim=0)
        dead_V = usage_V < _DEAD_SHARE * codes_BL.numel() / quantizer.vocab_size
        moved = restart_dead_codes(quantizer, self.model.features(images), dead_V, self.generator)
        table = quantizer.codebook.weight
        self.average.shadow["quantizer.codebook.weight"][moved] = table[moved]
        for moment in self.updater.optimizer.state.get(table, {}).values():
            if moment.shape == table.shape:
                moment[moved] = 0
        quantizer.usage_KV[:, moved] = codes_BL.numel() / quantizer.vocab_size / quantizer.scales.num_scales
        return len(moved)

    @torch.no_grad()
    def validate(self) -> Mapping[str, Any]:
        """Reconstruction and codebook health of the averaged weights, on held-out images if there are any."""
        self.model.eval()
        with self.average.swapped():
            report = evaluate_tokenizer(self.model, self.measured, self.objective.perceptual)
        self.model.train()
        return {"loss": report["l1"] + report["mse"] + report.get("perceptual", 0.0), **report}

    def find_faults(self, step: int, validation: Mapping[str, Any]) -> Mapping[str, str]:
        """Collapsed scales and a codebook that dies, with settings to change; see `collapse_warnings`."""
        return collapse_warnings(self.config, step, validation)

    @torch.no_grad()
    def draw(self, step: int) -> Image.Image | None:
        """Held-out images on top, then their decode after 1, 2, ... K scales."""
        self.model.eval()
        with self.average.swapped():
            strip = scale_strip(self.model, _spread(self.measured, _STRIP_IMAGES))
        self.model.train()
        return make_grid(strip.flatten(0, 1).cpu(), columns=strip.shape[1])

    def describe_batch(self, step: int) -> dict[str, Any]:
        """Places of the images of step `step` in the training split."""
        rows = self.order.indices(step * self.batch_size, self.batch_size)
        return {"seed": self.config.seed, "rows": [int(row) for row in rows]}

    def publish(self, folder: Path, info: Mapping[str, Any]) -> None:
        """Write the averaged weights as a tokenizer folder."""
        with self.average.swapped(), atomic_folder(folder) as temporary:
            save_tokenizer(temporary, self.model, info)


def train_tokenizer(
    images: Path,
    out: Path,
    config: TokenizerTrainConfig | None = None,
    *,
    device: str = "auto",
    resume: str = "auto",
    given: Collection[str] | None = None,
    on_step: OnStep = ignore,
    on_validation: OnValidation | None = None,
) -> TokenizerTrainResult:
    """Train a tokenizer on a folder of images, into a run folder; go on with a run begun there.

    images: an image tree; a "val" split, if there is one, is held out and measured on. The tokenizer is written to
    `out/tokenizer` with each checkpoint. given: names of settings that a resumed run must have been begun with, None means
    those that are not at their defaults; it keeps the others. on_validation: called with the run folder after each
    validation, e.g. to draw what its log holds.
    Raises DataError for images that cannot be used or fewer than a batch, ConfigError for settings that differ from the
    run's, and what `run_training` raises.
    """
    config = config or TokenizerTrainConfig()
    fixed = configs.changed(config) if given is None else given
    where = resolve_device(device)
    tree = open_images(images, allow_single_class=True)
    names = list(tree.splits)
    train = "train" if "train" in names else names[0]
    with open_run(out, resume) as run:
        config = keep_stored(config, run.config, fixed)
        architecture = config.tokenizer or TokenizerConfig.for_side(typical_side(tree.root, tree.splits[train]))
        precision = precision_name(resolve_precision(config.precision, where))
        config = replace(config, tokenizer=architecture, precision=precision)
        listing = hashlib.sha256("\n".join(tree.splits[train].paths).encode("utf-8", "surrogateescape")).hexdigest()
        inputs = {"images": listing}
        run.require_inputs(KIND, inputs)
        pixels = read_pixels(tree, train, config.tokenizer.image_size, on_step).to(where)
        if len(pixels) < config.batch_size:
            raise DataError(
                f"`{images}` has {len(pixels)} images to train on, fewer than one batch of {config.batch_size}",
                "use a smaller --batch-size or more images",
            )
        held_out = pixels[:0]
        if "val" in names and train != "val":
            held_out = read_pixels(tree, "val", config.tokenizer.image_size, on_step).to(where)
        trainer = TokenizerTrainer(config, pixels, held_out, where)
        on_step(Step(run.step, config.steps, message=_describe_plan(trainer)))
        run.settle(KIND, configs.to_dict(config), inputs, _FREE)
        loop = LoopConfig(
            steps=config.steps,
            log_every=config.log_every,
            validate_every=config.validate_every,
            sample_every=config.validate_every,
            save_every=config.save_every,
        )
        info = {"images": len(pixels), "classes": list(tree.classes)}
        result = run_training(trainer, run, loop, on_step, info, on_validation)
    return TokenizerTrainResult(
        folder=Path(out), step=result.step, seconds=result.seconds, validation=result.validation
    )


def _describe_plan(trainer: TokenizerTrainer) -> str:
    """Say what is about to be trained on what."""
    config, tokenizer = trainer.config, trainer.model.config
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    return (
        f"a tokenizer for {tokenizer.image_size} px: {parameters:,} parameters, {tokenizer.scales.seq_len:,} tokens an image "
        f"of {tokenizer.vocab_size:,} codes; {config.steps:,} steps of {config.batch_size:,} of "
        f"{len(trainer.images):,} images, {len(trainer.held_out):,} held out"
        f"{'' if len(trainer.held_out) else ', so that validation measures images of training'}"
    )


def _spread(images: Tensor, count: int) -> Tensor:
    """Take up to `count` images, evenly spread over all."""
    return images[:: max(1, len(images) // count)][:count]


def read_pixels(tree: ImageTree, split: str, size: int, on_step: OnStep = ignore) -> Tensor:
    """Decode a whole split into memory: uint8 (N, 3, size, size), one view an image.

    Raises DataError if that would take more than 8 GiB.
    """
    count = len(tree.splits[split])
    if count * 3 * size * size > _MAX_BYTES:
        raise DataError(
            f"{count:,} images of {size} px take {count * 3 * size * size / 2**30:.0f} GiB decoded, more than the 8 GiB "
            "a tokenizer's training keeps in memory",
            "train the tokenizer on a part of them",
        )
    parts, done = [], 0
    for batch in decode_images(tree, split, default_decode(tree, size)[split]):
        parts.append(batch.images)
        done += len(batch.requested)
        on_step(Step(done, count, unit="images"))
    return torch.cat(parts) if parts else torch.zeros(0, 3, size, size, dtype=torch.uint8)
