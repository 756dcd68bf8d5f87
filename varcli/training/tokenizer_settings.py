"""Settings of a tokenizer's training, and what they may be."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

from varcli.errors import ConfigError, unknown_name
from varcli.tokenizer import TokenizerConfig
from varcli.tokenizer.augment import AUGMENTATIONS
from varcli.tokenizer.base import SMALL_BELOW
from varcli.tokenizer.losses import PERCEPTUAL

CODEBOOK_INITS = ("random", "data")
REGULARIZERS = ("lecam", "r1", "none")
PARTS = {"encoder": ("encoder", "pre_conv"), "quantizer": ("quantizer",), "decoder": ("post_conv", "decoder")}
"""What may be frozen, and its modules: with the encoder and the quantizer frozen an image's codes stay what they are."""

_SMALL_BATCH, _SMALL_RATE = 192, 5e-4  # below 128 px, as emoji64's tokenizer learned: examples/benchmarks/tokenizer.md
# from there on: 16 images of 256 px took 14 GiB on an H100; others are as many pixels. The rate is 192 images' by the square
# root of the batch, rounded down; no run to its end has tried it
_LARGE_BATCH_PIXELS, _LARGE_RATE = 16 * 256**2, 1e-4
_AT_LEAST_0 = ("warmup_steps", "restart_every", "shift", "workers", "max_skip")
_AT_LEAST_0 += ("quantizer_weight", "perceptual_weight", "adversarial_weight", "lecam_weight", "r1_weight")
_SHARES = ("adversarial_start", "scale_dropout", "restart_until")


@dataclass(frozen=True, kw_only=True)
class TokenizerTrainConfig:
    """How a tokenizer is trained.

    At 64 px the defaults are the settings that emoji64's tokenizer was made with, from 4,762 images on one H100
    (examples/benchmarks/tokenizer.md says how it came out).
    """

    tokenizer: TokenizerConfig | None = None  # architecture; None chooses by the images' size
    steps: int = 8500  # optimizer steps
    batch_size: int | None = None  # images a step; None is 192 below 128 px, 16 at 256 px, 4 at 512 px (`at_side`)
    learning_rate: float | None = None  # peak, of the tokenizer; None is 5e-4 below 128 px, else 1e-4
    warmup_steps: int = 200  # optimizer steps of linear rise
    final_learning_rate: float = 0.02  # share of the peak left at the end of the cosine
    grad_clip: float | None = 1.0  # max global gradient norm; None turns clipping off
    codebook_init: str = "random"  # random, or data: the centres of the first images' features
    quantizer_weight: float = 1.0  # of the codebook and commitment loss
    perceptual_weight: float = 0.06  # of the distance in a fixed network's features
    perceptual: str = "lite0"  # which network: lite0, which comes with varcli, or lpips
    lpips_weights: Path | None = None  # folder of the two files of LPIPS; None looks among torch's downloads
    adversarial_weight: float = 0.05  # share of the content gradient's size given to the discriminator; 0 turns it off
    # share of the steps before the discriminator is heard; it learns from 0.8 of that on
    adversarial_start: float = 0.8
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
    # parts that do not learn, of encoder, quantizer and decoder; needs a tokenizer to start from
    frozen: tuple[str, ...] = ()
    checkpointing: bool = False  # compute each level's activations twice instead of keeping them: less memory, slower
    compile: bool | None = None  # torch.compile; None decides by device
    seed: int = 0  # of weights, order, crops, augmentation and restarts
    workers: int | None = None  # processes that decode images; None is one a core, 0 decodes in the trainer's own
    max_skip: int | None = None  # unusable images that are tolerated; None is 100 or 0.1 %, whichever is more
    log_every: int = 50  # steps between log lines
    validate_every: int = 1000  # steps between validations and pictures; 0 turns them off
    save_every: int = 1000  # steps between checkpoints

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, but is {value}")
        for name in ("learning_rate", "discriminator_learning_rate"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(f"{name} must be above 0, but is {value:g}")
        if self.grad_clip is not None and not self.grad_clip > 0:
            raise ConfigError(f"grad_clip must be above 0, but is {self.grad_clip:g}", "none turns clipping off")
        for name in _AT_LEAST_0:
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise ConfigError(f"{name} must be 0 or more, but is {value:g}")
        for name in _SHARES:
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} is a share between 0 and 1, but is {getattr(self, name):g}")
        if not 0 < self.final_learning_rate <= 1:
            raise ConfigError(f"final_learning_rate must be in (0, 1], but is {self.final_learning_rate:g}")
        if not 0 <= self.ema_decay < 1:
            raise ConfigError(f"ema_decay must be in [0, 1), but is {self.ema_decay:g}")
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
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed must be 0 or more, but is {self.seed}")

    def at_side(self, side: int) -> TokenizerTrainConfig:
        """Return these settings with the batch and learning rate that are left open chosen for images of `side` px."""
        if side < SMALL_BELOW:
            batch_size, learning_rate = _SMALL_BATCH, _SMALL_RATE
        else:
            batch_size, learning_rate = max(1, _LARGE_BATCH_PIXELS // side**2), _LARGE_RATE
        return replace(
            self,
            batch_size=self.batch_size or batch_size,
            learning_rate=self.learning_rate or learning_rate,
        )
