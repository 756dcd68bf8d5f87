"""One step of tokenizer training without its optimizers: settings, judges, losses, and what is drawn at random."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from varcli.devices import autocast
from varcli.distributed import ALONE, World
from varcli.errors import ConfigError, unknown_name
from varcli.tokenizer import VQVAE, TokenizerConfig
from varcli.tokenizer.augment import AUGMENTATIONS, augment_pair
from varcli.tokenizer.discriminator import PatchDiscriminator
from varcli.tokenizer.losses import (
    PERCEPTUAL,
    LeCamPenalty,
    discriminator_loss,
    generator_loss,
    pixel_loss,
    r1_penalty,
)
from varcli.training.frozen import freeze, learn

CODEBOOK_INITS = ("random", "data")
REGULARIZERS = ("lecam", "r1", "none")
PARTS = {"encoder": ("encoder", "pre_conv"), "quantizer": ("quantizer",), "decoder": ("post_conv", "decoder")}
"""What may be frozen, and its modules: with the encoder and the quantizer frozen an image's codes stay what they are."""
_R1_EVERY = (
    16  # steps of the discriminator between R1 penalties, each of which counts for all (arXiv:1912.04958, Sec. 3.1)
)


@dataclass(frozen=True, kw_only=True)
class TokenizerTrainConfig:
    """How a tokenizer is trained. The defaults suit some thousand images of 64 px on one GPU."""

    tokenizer: TokenizerConfig | None = None  # architecture; None chooses by the images' size
    steps: int = 10_000  # optimizer steps
    batch_size: int = 128  # images a step
    learning_rate: float = 4e-4  # peak, of the tokenizer
    warmup_steps: int = 200  # optimizer steps of linear rise
    final_learning_rate: float = 0.02  # share of the peak left at the end of the cosine
    grad_clip: float | None = 1.0  # max global gradient norm; None turns clipping off
    codebook_init: str = "random"  # random, or data: the centres of the first images' features
    quantizer_weight: float = 1.0  # of the codebook and commitment loss
    perceptual_weight: float = 0.5  # of the distance in a fixed network's features
    perceptual: str = "lite0"  # which network: lite0, which comes with varcli, or lpips
    lpips_weights: Path | None = None  # folder of the two files of LPIPS; None looks among torch's downloads
    adversarial_weight: float = 0.1  # share of the content gradient's size given to the discriminator; 0 turns it off
    adversarial_start: float = (
        0.5  # share of the steps before the discriminator is heard; it learns from 0.8 of that on
    )
    discriminator_learning_rate: float = 2e-4  # constant
    discriminator_augment: tuple[str, ...] = tuple(AUGMENTATIONS)  # changes to what it sees, so that it learns no image
    regularizer: str = "lecam"  # what steadies the discriminator: lecam, r1 or none
    lecam_weight: float = 1e-3  # of the distance from its running averages
    r1_weight: float = 1.0  # gamma, of its gradient at real images
    scale_dropout: float = 0.1  # share of images that keep only some of their coarse scales
    restart_every: int = 100  # steps between restarts of codes nobody picks; 0 turns them off
    restart_until: float = 0.7  # share of the steps after which codes are left alone
    ema_decay: float = 0.999  # of the weights that are saved
    flip: bool = True  # mirror images at random; a tokenizer may, whatever the pictures say
    shift: int = 4  # pixels an image is moved at most, its border repeated
    precision: str = "auto"  # auto, fp32 or bf16
    frozen: tuple[
        str, ...
    ] = ()  # parts that do not learn, of encoder, quantizer and decoder; needs a tokenizer to start from
    checkpointing: bool = False  # compute each level's activations twice instead of keeping them: less memory, slower
    compile: bool | None = None  # torch.compile; None decides by device
    seed: int = 0  # of weights, order, crops, augmentation and restarts
    workers: int | None = None  # processes that decode images; None is one a core, 0 decodes in the trainer's own
    max_skip: int | None = None  # unusable images that are tolerated; None is 100 or 0.1 %, whichever is more
    log_every: int = 50  # steps between log lines
    validate_every: int = 1000  # steps between validations and pictures; 0 turns them off
    save_every: int = 1000  # steps between checkpoints

    def __post_init__(self) -> None:
        if min(self.steps, self.batch_size) < 1:
            raise ConfigError("steps and batch_size must be at least 1")
        if not 0 < self.learning_rate < math.inf or not 0 <= self.ema_decay < 1 or self.shift < 0:
            raise ConfigError("learning_rate must be above 0, ema_decay in [0, 1) and shift 0 or more")
        if min(self.workers or 0, self.max_skip or 0) < 0:
            raise ConfigError("workers and max_skip must be 0 or more")
        if self.precision not in ("auto", "fp32", "bf16"):
            raise unknown_name("precision", self.precision, ["auto", "fp32", "bf16"])
        if self.perceptual not in PERCEPTUAL:
            raise unknown_name("perceptual loss", self.perceptual, PERCEPTUAL)
        if self.codebook_init not in CODEBOOK_INITS:
            raise unknown_name("codebook init", self.codebook_init, CODEBOOK_INITS)
        if self.regularizer not in REGULARIZERS:
            raise unknown_name("regularizer", self.regularizer, REGULARIZERS)
        for name in self.discriminator_augment:
            if name not in AUGMENTATIONS:
                raise unknown_name("augmentation", name, AUGMENTATIONS)
        for name in self.frozen:
            if name not in PARTS:
                raise unknown_name("part to freeze", name, PARTS)
        if set(self.frozen) == set(PARTS):
            raise ConfigError(f"with {', '.join(PARTS)} frozen nothing is left to learn", "leave one out of `frozen`")
        weights = (self.quantizer_weight, self.perceptual_weight, self.adversarial_weight)
        weights += (self.lecam_weight, self.r1_weight)
        if not all(0 <= weight < math.inf for weight in weights):
            raise ConfigError("the weights of the losses must be 0 or more")
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed must be 0 or more, but is {self.seed}")
        if not 0 <= self.adversarial_start <= 1 or not 0 <= self.scale_dropout <= 1:
            raise ConfigError("adversarial_start and scale_dropout are shares between 0 and 1")


class TokenizerObjective(nn.Module):
    """Everything one step of tokenizer training needs besides optimizers: the tokenizer, its judges, and their losses.

    world: processes that each see a part of the batch, all of one size. Gradients and the numbers returned are those of
    this process's part, whose mean over the processes is that of the batch.
    """

    def __init__(
        self, config: TokenizerTrainConfig, device: torch.device, dtype: torch.dtype, world: World = ALONE
    ) -> None:
        super().__init__()
        self.config, self.device, self.dtype, self.world = config, device, dtype, world
        self.tokenizer = VQVAE(config.tokenizer)
        self.tokenizer.encoder.checkpointing = self.tokenizer.decoder.checkpointing = config.checkpointing
        self.frozen = freeze(self.tokenizer, (name for part in config.frozen for name in PARTS[part]))
        self.discriminator = PatchDiscriminator() if config.adversarial_weight else None
        self.lecam = LeCamPenalty()
        self.perceptual = PERCEPTUAL[config.perceptual](config.lpips_weights) if config.perceptual_weight else None
        self.to(device)
        is_cuda = device.type == "cuda"
        if is_cuda:
            self.to(memory_format=torch.channels_last)  # what tensor cores convolve without turning the data around
        self.run_tokenizer: nn.Module = self.tokenizer
        self.run_perceptual: nn.Module | None = self.perceptual
        if is_cuda if config.compile is None else config.compile:
            # CUDA graphs ("reduce-overhead"), since a small tokenizer's thousand kernels take longer to launch than to run
            self.run_tokenizer = torch.compile(self.tokenizer, mode="reduce-overhead")
            if self.perceptual is not None:
                self.run_perceptual = torch.compile(self.perceptual, mode="reduce-overhead")

    def learn(self) -> None:
        """Put the tokenizer into training mode, but for its frozen parts, which must drop out nothing."""
        learn(self.tokenizer, self.frozen)

    def backward_tokenizer(
        self, images: Tensor, num_kept_B: Tensor, adversarial_share: float, generator: torch.Generator
    ) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Add one batch's gradients to the tokenizer's parameters.

        images: (B, 3, H, W) in [-1, 1]. adversarial_share: size of the discriminator's gradient on the reconstruction
        as a share of the content losses' (VQGAN, arXiv:2012.09841, Eq. 7, measured at the picture instead of the last
        layer, which needs no second pass). Returns (numbers for the log, reconstructions, codes).
        """
        reconstructions, quantizer_loss, codes = self._run(images, num_kept_B)
        leaf = reconstructions.detach().float().requires_grad_()
        pixel = pixel_loss(images, leaf)
        content, numbers = pixel, {"pixel_loss": pixel.detach(), "quantizer_loss": quantizer_loss.detach()}
        if self.run_perceptual is not None:
            with autocast(self.device, self.dtype):
                perceptual = self.run_perceptual(images, leaf)
            content = content + self.config.perceptual_weight * perceptual
            numbers["perceptual_loss"] = perceptual.detach()
        (gradient,) = torch.autograd.grad(content, leaf)
        if adversarial_share > 0:
            with autocast(self.device, self.dtype):
                _, seen = augment_pair(images, leaf, self.config.discriminator_augment, generator, self.world)
                adversarial = generator_loss(self.discriminator(seen))
            (push,) = torch.autograd.grad(adversarial, leaf)
            squares = torch.stack([gradient.square().sum(), push.square().sum()])
            content_norm, push_norm = self.world.sum(squares).sqrt()  # over the batch, wherever its parts are
            gradient = gradient + push * (adversarial_share * content_norm / (push_norm + 1e-8))
            numbers["adversarial_loss"] = adversarial.detach()
        starts = [(reconstructions, gradient.to(reconstructions.dtype))]
        starts.append((quantizer_loss * self.config.quantizer_weight, None))
        # with frozen parts one of the two may reach nothing that learns
        tensors, gradients = zip(*(start for start in starts if start[0].requires_grad), strict=True)
        torch.autograd.backward(tensors, gradients)
        return numbers, leaf.detach(), codes

    def _run(self, images: Tensor, num_kept_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Run the tokenizer, and without torch.compile from now on if it was not asked for and does not work here."""
        try:
            torch.compiler.cudagraph_mark_step_begin()
            with autocast(self.device, self.dtype):
                return self.run_tokenizer(images, num_kept_B)
        except RuntimeError as error:
            is_compiled = self.run_tokenizer is not self.tokenizer
            if isinstance(error, torch.OutOfMemoryError) or self.config.compile or not is_compiled:
                raise
            self.run_tokenizer, self.run_perceptual = self.tokenizer, self.perceptual
        return self._run(images, num_kept_B)

    def backward_discriminator(
        self, step: int, images: Tensor, reconstructions: Tensor, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Add one batch's gradients of step `step` to the discriminator's parameters; return numbers for the log."""
        real, fake = augment_pair(images, reconstructions, self.config.discriminator_augment, generator, self.world)
        with autocast(self.device, self.dtype):
            real_logits, fake_logits = self.discriminator(torch.cat([real, fake])).float().chunk(2)
        loss = discriminator_loss(real_logits, fake_logits)
        numbers = {"discriminator_loss": loss.detach()}
        numbers |= {"real_logit": real_logits.detach().mean(), "fake_logit": fake_logits.detach().mean()}
        if self.config.regularizer == "lecam":
            loss = loss + self.config.lecam_weight * self.lecam(real_logits, fake_logits, self.world)
        elif self.config.regularizer == "r1" and step % _R1_EVERY == 0:
            penalty = r1_penalty(self.discriminator, real)
            loss = loss + 0.5 * self.config.r1_weight * _R1_EVERY * penalty
            numbers["r1_penalty"] = penalty.detach()
        loss.backward()
        return numbers


def adversarial_share(step: int, config: TokenizerTrainConfig) -> float:
    """How strongly the discriminator is heard at `step`: 0 until its start, then a linear rise over 5 % of the steps."""
    start = config.adversarial_start * config.steps
    if not config.adversarial_weight or step < start:
        return 0.0
    return config.adversarial_weight * min(1.0, (step - start) / max(0.05 * config.steps, 1))


def augment(
    images_u8: Tensor, config: TokenizerTrainConfig, generator: torch.Generator, world: World = ALONE
) -> Tensor:
    """Mirror and shift uint8 images (B, 3, H, W) at random by whole pixels; returns floats in [-1, 1].

    world: processes that have such a part of a batch each; as in `augment_pair`.
    """
    batch, _, height, width = images_u8.shape
    whole = (batch * world.size, 1)
    device = images_u8.device

    def offsets() -> Tensor:
        drawn = torch.randint(-config.shift, config.shift + 1, whole, generator=generator, device=device)
        return world.share(drawn)

    rows = (torch.arange(height, device=device) + offsets()).clamp(0, height - 1)
    columns = (torch.arange(width, device=device) + offsets()).clamp(0, width - 1)
    if config.flip:
        mirrored = world.share(torch.rand(whole, generator=generator, device=device)) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    picks = torch.arange(batch, device=device).view(batch, 1, 1)
    moved = images_u8.permute(0, 2, 3, 1)[picks, rows.unsqueeze(2), columns.unsqueeze(1)]
    return moved.permute(0, 3, 1, 2).float() / 127.5 - 1


def draw_kept_scales(
    batch: int, config: TokenizerTrainConfig, generator: torch.Generator, device: torch.device
) -> Tensor:
    """Draw how many coarse scales each image keeps: all K, or for a share of them a uniform number in [1, K - 1]."""
    num_scales = config.tokenizer.scales.num_scales
    some = torch.randint(1, max(num_scales, 2), (batch,), generator=generator, device=device)
    dropped = torch.rand(batch, generator=generator, device=device) < config.scale_dropout
    return torch.where(dropped & (num_scales > 1), some, num_scales)
