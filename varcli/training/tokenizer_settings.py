"""Settings of a tokenizer's training, and what they may be."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from varcli.errors import ConfigError, unknown_name
from varcli.tokenizer import TokenizerConfig
from varcli.tokenizer.augment import AUGMENTATIONS
from varcli.tokenizer.losses import PERCEPTUAL

CODEBOOK_INITS = ("random", "data")
REGULARIZERS = ("lecam", "r1", "none")
PARTS = {"encoder": ("encoder", "pre_conv"), "quantizer": ("quantizer",), "decoder": ("post_conv", "decoder")}
"""What may be frozen, and its modules: with the encoder and the quantizer frozen an image's codes stay what they are."""


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
