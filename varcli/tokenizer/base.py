"""What every tokenizer is: its config, and the contract between images, feature maps and codes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from torch import Tensor

from varcli.errors import ConfigError
from varcli.scales import NAMED_SCHEDULES, PatchNums

_MOST, _MOST_LAYERS = 2**20, 64  # far beyond any tokenizer: a larger number is a mistake or malice
SMALL_BELOW = 128  # px: images with a shorter side get a small architecture where none is asked for


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """Architecture of a multi-scale residual VQ tokenizer; the defaults are the released one for 256 px.

    Source: VAR, arXiv:2404.02905, and its released weights `vae_ch160v4096z32`.
    """

    patch_nums: tuple[int, ...] = NAMED_SCHEDULES["256"]  # sides of the token maps, coarse to fine
    vocab_size: int = 4096  # code vectors in the codebook
    code_channels: int = 32  # channels of one code vector
    width: int = 160  # channels at full resolution
    # width of each level over `width`; one halving between levels
    channel_multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    num_res_blocks: int = 2  # residual blocks a level in the encoder; the decoder has one more
    # groups of every group norm; small widths want fewer, since one channel a group loses its mean
    norm_groups: int = 32
    dropout: float = 0.0  # inside residual blocks, while training
    quant_conv_kernel: int = 3  # side of the convolutions around the quantizer, odd
    phi_residual: float = 0.5  # share of the convolution in phi; 0 makes phi the identity
    num_phis: int = 4  # phi convolutions shared by neighbouring scales; 1 shares one, 0 gives each scale its own
    cosine_codes: bool = False  # choose codes by angle instead of distance (`using_znorm` of the released code)
    commitment_weight: float = 0.25  # beta, weight of the loss that pulls features to their codes

    @classmethod
    def for_side(cls, side: int) -> TokenizerConfig:
        """Return an architecture for images of `side` pixels: a small one for 64 px below 128, else the released one."""
        if side >= SMALL_BELOW:
            return cls()
        return cls(
            patch_nums=(1, 2, 3, 4, 5, 6, 8),
            vocab_size=1024,
            code_channels=16,
            width=40,
            channel_multipliers=(1, 1, 2, 3),
            num_res_blocks=1,
            norm_groups=8,
        )

    def __post_init__(self) -> None:
        PatchNums(self.patch_nums)
        if self.vocab_size < 2:
            raise ConfigError(f"vocab_size must be at least 2, but is {self.vocab_size}", "one code alone says nothing")
        if min(self.code_channels, self.width, self.num_res_blocks) < 1:
            raise ConfigError("code_channels, width and num_res_blocks must be at least 1")
        widest = self.width * max(self.channel_multipliers, default=1)
        if max(self.vocab_size, self.code_channels, widest, self.norm_groups, self.num_phis) > _MOST or (
            max(self.num_res_blocks, len(self.channel_multipliers), self.quant_conv_kernel) > _MOST_LAYERS
        ):
            raise ConfigError(
                f"codes and channels are at most {_MOST:,}, and residual blocks, levels and sides of convolutions at most "
                f"{_MOST_LAYERS}"
            )
        if self.norm_groups < 1 or not self.channel_multipliers or min(self.channel_multipliers) < 1:
            raise ConfigError("norm_groups and every channel multiplier must be at least 1")
        if not 0 <= self.dropout < 1 or not abs(self.phi_residual) <= 1 or not self.commitment_weight >= 0:
            raise ConfigError("dropout must be in [0, 1), phi_residual in [-1, 1] and commitment_weight 0 or more")
        if any((self.width * m) % self.norm_groups for m in self.channel_multipliers):
            step = math.lcm(*(self.norm_groups // math.gcd(self.norm_groups, m) for m in self.channel_multipliers))
            most = math.gcd(self.norm_groups, *(self.width * m for m in self.channel_multipliers))
            raise ConfigError(
                f"every level needs a multiple of norm_groups = {self.norm_groups} channels, but width {self.width} "
                f"times {self.channel_multipliers} does not give that",
                f"use a width that is a multiple of {step}, such as {-(-self.width // step) * step}, or norm_groups {most}",
            )
        if self.quant_conv_kernel < 1 or self.quant_conv_kernel % 2 == 0:
            raise ConfigError(f"quant_conv_kernel must be odd, but is {self.quant_conv_kernel}")
        if self.num_phis < 0:
            raise ConfigError(f"num_phis must be 0 or more, but is {self.num_phis}")

    def at_size(self, size: int, patch_nums: Sequence[int] | None = None) -> TokenizerConfig:
        """Return this architecture for images of `size` pixels, with `patch_nums` or a schedule that ends at their grid.

        Raises ConfigError if the downsampling does not divide `size`, or patch_nums end at another grid.
        """
        factor = self.downsampling
        if size < factor or size % factor:
            below = max(1, size // factor) * factor
            raise ConfigError(
                f"images of {size} px cannot be divided by the downsampling of {factor}, which the "
                f"{len(self.channel_multipliers)} channel_multipliers {self.channel_multipliers} make",
                f"use {below} or {below + factor} px, or another number of channel_multipliers",
            )
        grid = size // factor
        if patch_nums is not None and patch_nums[-1] != grid:
            raise ConfigError(
                f"patch_nums end at {patch_nums[-1]}, but images of {size} px are a grid of {grid}x{grid} after a "
                f"downsampling of {factor}",
                f"end them at {grid}, or leave one of the two out",
            )
        return replace(self, patch_nums=tuple(patch_nums or PatchNums.up_to(grid).sides))

    @property
    def scales(self) -> PatchNums:
        """The schedule of scales."""
        return PatchNums(self.patch_nums)

    @property
    def downsampling(self) -> int:
        """Image side over latent grid side: 8 for four levels, 16 for five."""
        return 2 ** (len(self.channel_multipliers) - 1)

    @property
    def image_size(self) -> int:
        """Side in pixels of the images whose latent grid is the finest token map."""
        return self.downsampling * self.scales.grid_side


class Tokenizer(Protocol):
    """Images to codes and back. B images, L codes of all scales, Z code channels, h = w latent grid side."""

    config: TokenizerConfig

    def encode(self, images_B3HW: Tensor) -> Tensor:
        """Images in [-1, 1] to int64 codes (B, L), coarse to fine."""

    def decode(self, f_hat_BZhw: Tensor) -> Tensor:
        """Feature maps to images (B, 3, H, W), clamped to [-1, 1]."""

    def fingerprint(self) -> str:
        """Sixteen hex digits that change with any weight or setting; ties a codes cache to its tokenizer."""
