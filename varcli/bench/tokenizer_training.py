"""One step of tokenizer training on random images: the trainer's own, with everything at work."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import count

import torch

from varcli.bench.config import BenchConfig
from varcli.bench.counting import (
    count_forward,
    decoder_flops,
    distance_flops,
    empty_images,
    encoder_flops,
    phi_flops,
)
from varcli.devices import precision_name
from varcli.tokenizer.discriminator import PatchDiscriminator
from varcli.tokenizer.losses import PERCEPTUAL
from varcli.training.pixels import Pixels
from varcli.training.tokenizer_settings import TokenizerTrainConfig
from varcli.training.tokenizer_trainer import TokenizerTrainer

_STEPS = 1_000_000  # of the run that the measured step is taken from
_START = 900_000  # the step measured first: all losses are at full strength there


def tokenizer_training_stage(
    size: int, config: BenchConfig, device: torch.device, dtype: torch.dtype
) -> tuple[Callable[[], object], float]:
    """Return one step of `varcli train-tokenizer` late in a run, and the operations of one of its images.

    The step is `TokenizerTrainer.train_step` on `size` random images that lie on the device: augmentation, encoder,
    quantizer, decoder, pixel and perceptual loss, the discriminator heard and taught, clipping, both optimizers, the average
    of weights and the count of codes. Left out are what a run does once in a while: restarts of codes, validation and
    checkpoints. Raises ConfigError for fp16, which that training does not know.
    """
    settings = training_settings(size, config, dtype)
    side = settings.tokenizer.image_size
    images = torch.randint(0, 256, (size, 3, side, side), dtype=torch.uint8, device=device)
    trainer = TokenizerTrainer(settings, Pixels(images), images[:0], device)
    steps = count(_START)
    return lambda: trainer.train_step(next(steps)), tokenizer_training_flops(settings)


def training_settings(size: int, config: BenchConfig, dtype: torch.dtype) -> TokenizerTrainConfig:
    """The training's settings with what the benchmark decides put in."""
    settings = config.tokenizer_training or TokenizerTrainConfig()
    tokenizer = settings.tokenizer or config.tokenizer
    return replace(
        settings.at_side(tokenizer.image_size),
        tokenizer=tokenizer,
        batch_size=size,
        steps=_STEPS,
        restart_every=0,
        precision=precision_name(dtype),
        compile=config.compile,
    )


def tokenizer_training_flops(settings: TokenizerTrainConfig, batch: int = 1) -> float:
    """Operations of one training step on `batch` images: convolutions, matrix products and attention.

    Backward counts as twice forward, once where only the gradient of the images is needed. So there are
    - 3 forward passes' worth of the encoder, the decoder and phi, and the distances to all codes once;
    - 3 of the perceptual network: images, reconstructions, and the gradient of the reconstructions;
    - 8 of the discriminator: 2 to hear it (reconstructions and their gradient), 6 to teach it (images and reconstructions,
      forward and backward).
    Nothing is counted for normalisation, activations, resizing between scales, spectral norm, R1, augmentation and the
    optimizers, nor for work done again to save memory. Losses whose weight is 0 do not count.
    """
    tokenizer = settings.tokenizer
    flops = 3 * (encoder_flops(tokenizer, batch) + decoder_flops(tokenizer, batch) + phi_flops(tokenizer, batch))
    flops += distance_flops(tokenizer, batch)
    if settings.perceptual_weight:

        def compare(network: torch.nn.Module) -> None:
            network(empty_images(tokenizer, batch), empty_images(tokenizer, batch))

        both = count_forward(PERCEPTUAL[settings.perceptual](settings.lpips_weights), compare)
        flops += 1.5 * both
    if settings.adversarial_weight:
        flops += 8 * count_forward(PatchDiscriminator(), lambda network: network(empty_images(tokenizer, batch)))
    return flops
