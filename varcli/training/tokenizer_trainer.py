"""The trainer of a tokenizer: its model, judges, optimizers and images, plugged into the shared loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from varcli.artifacts.write import atomic_folder
from varcli.data.samples import make_grid
from varcli.devices import resolve_precision, try_compiled
from varcli.distributed import ALONE, World
from varcli.tokenizer import VQVAE
from varcli.tokenizer.augment import draw_kept_scales, mirror_and_shift
from varcli.tokenizer.health import count_codes, restart_dead_codes
from varcli.tokenizer.initialize import init_codebook
from varcli.tokenizer.judge import evaluate_tokenizer, scale_strip
from varcli.tokenizer.store import KIND, save_tokenizer
from varcli.training.ema import Ema
from varcli.training.optim import Updater, build_adamw
from varcli.training.parallel import average_numbers, share_batch
from varcli.training.pixels import ImageSource, Pixels
from varcli.training.schedules import Schedule
from varcli.training.state import Parts, undisturbed
from varcli.training.tokenizer_health import collapse_warnings
from varcli.training.tokenizer_objective import TokenizerObjective, adversarial_share
from varcli.training.tokenizer_parent import load_parent
from varcli.training.tokenizer_settings import TokenizerTrainConfig
from varcli.training.trainer import Trainer

_USAGE_DECAY = 0.99  # of the running counts that say which codes are dead
_DEAD_SHARE = 0.02  # of a code's fair share of the picks, below which it is dead
_STRIP_IMAGES = 16  # held-out images in the pictures of a run
_INIT_IMAGES = 512  # whose features a codebook begins with
_TRIES = 2  # steps that try out what was compiled: CUDA graphs are recorded in the second
_MEASURED_IMAGES = 1024  # of the training images, that validation takes where none are held out


class TokenizerTrainer(Trainer):
    """Reconstruction, quantizer and a late discriminator, plugged into the shared loop.

    images: what to learn from. held_out: what to measure on; if it is empty, validation takes images of training. world:
    the processes that share every batch. What is drawn at random is drawn for the whole batch by all of them alike, and
    what is counted is counted over all of them, so that their number changes nothing but the time. parent: the tokenizer
    to start from.
    """

    published = KIND
    shown = ("loss", "psnr", "codebook_used", "codes_restarted")
    memory_hint = "use a smaller --batch-size, or --set checkpointing=true"
    numeric_hint = (
        "start anew with a lower learning rate (--lr), --precision fp32, or a lower --set discriminator_learning_rate if "
        "the discriminator was at work"
    )

    def __init__(
        self,
        config: TokenizerTrainConfig,
        images: ImageSource,
        held_out: Tensor,
        device: torch.device,
        world: World = ALONE,
        parent: VQVAE | None = None,
    ) -> None:
        torch.manual_seed(config.seed)
        self.world, self.share_size = world, share_batch(config.batch_size, world)
        self.config, self.images, self.held_out, self.device = config, images, held_out, device
        # the first process alone measures
        self.measured = held_out if len(held_out) or not world.is_first else images.spread(_MEASURED_IMAGES)
        self.batch_size = config.batch_size
        self.generator = torch.Generator(device).manual_seed(config.seed)
        self.objective = TokenizerObjective(config, device, resolve_precision(config.precision, device), world)
        self.model = self.objective.tokenizer
        self.objective.learn()
        self.counts_codes = "quantizer" not in config.frozen
        if parent is not None:
            load_parent(self.model, parent, config.batch_size if self.counts_codes else None)
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
            build_adamw(self.model, betas=(0.9, 0.99)),
            schedule,
            grad_clip=config.grad_clip,
            ema=self.average,
            world=world,
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
            self.judge = Updater(build_adamw(self.objective.discriminator, betas=(0.5, 0.9)), constant, world=world)
            modules |= {"discriminator": self.objective.discriminator, "lecam": self.objective.lecam}
            optimizers["discriminator"] = self.judge.optimizer
        self.parts = Parts(
            modules=modules,
            optimizers=optimizers,
            averages={KIND: self.average},
            generators={"batches": self.generator},
        )

    def checkpoint_bytes(self) -> int:
        """Size of one checkpoint: weights and two moments of tokenizer and discriminator, and the average."""
        tensors = [tensor for module in self.parts.modules.values() for tensor in module.state_dict().values()]
        learned = [weight for module in self.parts.modules.values() for weight in module.parameters()]
        moments = [weight for weight in learned if weight.requires_grad for _ in range(2)]
        return sum(tensor.nbytes for tensor in (*tensors, *moments, *self.average.shadow.values()))

    def prepare(self, tell: Callable[[str], object]) -> None:
        """Try out what torch.compile made, without learning from it; what fails and was not asked for is left out and told.

        Every process must call it: what one of them cannot compile, none of them runs compiled.
        """
        if not self.objective.is_compiled:
            return
        config, side = self.config, self.config.tokenizer.image_size
        dice = torch.Generator(self.device).manual_seed(config.seed)
        some = torch.zeros(self.share_size, 3, side, side, dtype=torch.uint8, device=self.device)
        images, kept = self._draw(some, dice)

        def try_out() -> None:
            for _ in range(_TRIES):
                self.updater.optimizer.zero_grad(set_to_none=True)
                self.objective.backward_tokenizer(images, kept, 0.0, dice)

        with undisturbed(self.device):
            works = try_compiled(try_out, self.objective.uncompile, tell, is_optional=not config.compile)
        self.updater.optimizer.zero_grad(set_to_none=True)
        if any(self.world.largest(not works)):
            self.objective.uncompile()

    def train_step(self, step: int) -> Mapping[str, Tensor | float]:
        """One step of the tokenizer and, once it learns, one of the discriminator; see `Trainer.train_step`."""
        config, world = self.config, self.world
        if step == 0 and config.codebook_init == "data":
            self._init_codebook()
        if config.tokenizer.dropout and world.size > 1:  # drawn by each process for its part, as nothing else is
            torch.manual_seed((config.seed + step * world.size + world.rank) % 2**63)
        position = step * config.batch_size + world.rank * self.share_size
        images, kept = self._draw(self.images.batch(position, self.share_size), self.generator)
        share = adversarial_share(step, config)
        self.updater.begin(step)
        numbers, reconstructions, codes = self.objective.backward_tokenizer(images, kept, share, self.generator)
        numbers = average_numbers(numbers, world)
        loss = numbers["pixel_loss"]
        if "perceptual_loss" in numbers:
            loss = loss + config.perceptual_weight * numbers["perceptual_loss"]
        numbers = {"loss": loss, **numbers, **self.updater.finish(loss + numbers["quantizer_loss"])}
        if self.judge is not None and step >= 0.8 * config.adversarial_start * config.steps:
            self.judge.begin(step)
            found = self.objective.backward_discriminator(step, images, reconstructions, self.generator)
            numbers |= average_numbers(found, world)
            judged = self.judge.finish(numbers["discriminator_loss"])
            numbers["discriminator_gradient_norm"] = judged["gradient_norm"]
            numbers["skipped"] = torch.maximum(numbers["skipped"], judged["skipped"])
        numbers["codes_restarted"] = self._keep_codes_alive(step, images, codes)
        return numbers

    def _draw(self, images_u8: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return this process's images, moved at random and in [-1, 1], and how many scales each of them keeps."""
        config, world = self.config, self.world
        images = mirror_and_shift(images_u8, flip=config.flip, shift=config.shift, generator=generator, world=world)
        num_scales = config.tokenizer.scales.num_scales
        kept = draw_kept_scales(config.batch_size, num_scales, config.scale_dropout, generator, self.device)
        return images, world.share(kept)

    @torch.no_grad()
    def _init_codebook(self) -> None:
        """Put the codebook where the features of some images are, before the first step."""
        images = self.images.spread(max(_INIT_IMAGES, self.batch_size))
        chunks = [self.model.features(chunk.float() / 127.5 - 1) for chunk in images.split(self.share_size)]
        init_codebook(self.model.quantizer, torch.cat(chunks), self.generator)
        self.world.copy_first(self.model.quantizer.codebook.weight)  # a GPU's k-means adds up in no fixed order
        self.average.shadow["quantizer.codebook.weight"].copy_(self.model.quantizer.codebook.weight)

    @torch.no_grad()
    def _keep_codes_alive(self, step: int, images: Tensor, codes_BL: Tensor) -> int:
        """Count the picks of this step; now and then move codes nobody picks onto what the batch left over."""
        config, quantizer = self.config, self.model.quantizer
        if not self.counts_codes:
            return 0
        counts = self.world.sum(count_codes(codes_BL, quantizer.scales, quantizer.vocab_size))
        picks = codes_BL.numel() * self.world.size
        quantizer.usage_KV.lerp_(counts, 1 - _USAGE_DECAY)
        every = config.restart_every
        if not every or (step + 1) % every or step > config.restart_until * config.steps:
            return 0
        usage_V = quantizer.usage_KV.sum(dim=0)
        dead_V = usage_V < _DEAD_SHARE * picks / quantizer.vocab_size
        moved = restart_dead_codes(quantizer, self.model.features(images), dead_V, self.generator, self.world)
        table = quantizer.codebook.weight
        self.average.shadow["quantizer.codebook.weight"][moved] = table[moved]
        for moment in self.updater.optimizer.state.get(table, {}).values():
            if moment.shape == table.shape:
                moment[moved] = 0
        quantizer.usage_KV[:, moved] = picks / quantizer.vocab_size / quantizer.scales.num_scales
        return len(moved)

    @torch.no_grad()
    def validate(self) -> Mapping[str, Any]:
        """Reconstruction and codebook health of the averaged weights, on held-out images if there are any.

        "loss" is what training calls so: the pixel loss and the weighted perceptual distance.
        """
        self.model.eval()
        with self.average.swapped():
            report = evaluate_tokenizer(self.model, self.measured, self.objective.perceptual)
        self.objective.learn()
        perceptual = self.config.perceptual_weight * report.get("perceptual", 0.0)
        return {"loss": report["l1"] + report["mse"] + perceptual, **report}

    def find_faults(self, step: int, validation: Mapping[str, Any]) -> Mapping[str, str]:
        """Collapsed scales and a codebook that dies, with settings to change; see `collapse_warnings`."""
        return collapse_warnings(self.config, step, validation)

    @torch.no_grad()
    def draw(self, step: int) -> Image.Image | None:
        """Held-out images on top, then their decode after 1, 2, ... K scales."""
        self.model.eval()
        with self.average.swapped():
            strip = scale_strip(self.model, Pixels(self.measured).spread(_STRIP_IMAGES))
        self.objective.learn()
        return make_grid(strip.flatten(0, 1).cpu(), columns=strip.shape[1])

    def describe_batch(self, step: int) -> dict[str, Any]:
        """Places of the images of step `step` in the training split."""
        return {"seed": self.config.seed, "rows": self.images.rows(step * self.batch_size, self.batch_size)}

    def publish(self, folder: Path, info: Mapping[str, Any]) -> None:
        """Write the averaged weights as a tokenizer folder."""
        with self.average.swapped(), atomic_folder(folder) as temporary:
            save_tokenizer(temporary, self.model, info)
