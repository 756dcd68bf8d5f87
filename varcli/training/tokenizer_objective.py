"""One step of tokenizer training without its optimizers: judges and losses."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from varcli.devices import autocast
from varcli.distributed import ALONE, World
from varcli.tokenizer import VQVAE
from varcli.tokenizer.augment import augment_pair
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
from varcli.training.tokenizer_settings import PARTS, TokenizerTrainConfig

# steps of the discriminator between R1 penalties, each of which counts for all (arXiv:1912.04958, Sec. 3.1)
_R1_EVERY = 16


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

    @property
    def is_compiled(self) -> bool:
        """Whether the tokenizer and the perceptual network run through torch.compile."""
        return self.run_tokenizer is not self.tokenizer

    def uncompile(self) -> None:
        """Go back to plain torch."""
        self.run_tokenizer, self.run_perceptual = self.tokenizer, self.perceptual

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
        torch.compiler.cudagraph_mark_step_begin()
        with autocast(self.device, self.dtype):
            reconstructions, quantizer_loss, codes = self.run_tokenizer(images, num_kept_B)
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
