"""The convolutional encoder and decoder around the quantizer.

Source: the VQGAN autoencoder (arXiv:2012.09841) in the sizes of VAR (arXiv:2404.02905).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varcli.tokenizer.base import TokenizerConfig


def group_norm(channels: int) -> nn.GroupNorm:
    """Group norm as everywhere in this autoencoder: 32 groups, eps 1e-6."""
    return nn.GroupNorm(32, channels, eps=1e-6)


def conv3x3(in_channels: int, out_channels: int) -> nn.Conv2d:
    """A 3x3 convolution that keeps the side."""
    return nn.Conv2d(in_channels, out_channels, 3, padding=1)


class ResBlock(nn.Module):
    """Two normalised convolutions beside a skip path: (B, in, h, w) -> (B, out, h, w)."""

    def __init__(self, in_channels: int, out_channels: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm1 = group_norm(in_channels)
        self.conv1 = conv3x3(in_channels, out_channels)
        self.norm2 = group_norm(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = conv3x3(out_channels, out_channels)
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block."""
        y = self.conv1(F.silu(self.norm1(x)))
        y = self.conv2(self.dropout(F.silu(self.norm2(y))))
        return self.shortcut(x) + y


class AttentionBlock(nn.Module):
    """Single-head self-attention over all positions of a map, with a residual path."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = group_norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block; the softmax scale is 1 / sqrt(channels)."""
        batch, channels, height, width = x.shape
        qkv = self.qkv(self.norm(x)).flatten(2).transpose(1, 2)  # (B, hw, 3C), channel order q | k | v
        q, k, v = qkv.unsqueeze(1).chunk(3, dim=-1)
        y = F.scaled_dot_product_attention(q, k, v).squeeze(1)
        return x + self.proj_out(y.transpose(1, 2).reshape(batch, channels, height, width))


class Downsample(nn.Module):
    """Halve the side: zeros on the right and bottom only, then a strided 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, h/2, w/2)."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double the side: nearest neighbour, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = conv3x3(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, 2h, 2w)."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """All blocks at one resolution, then an optional change of resolution."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        num_blocks: int,
        dropout: float,
        attend: bool,
        resample: nn.Module | None,
    ) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * num_blocks
        self.blocks = nn.ModuleList(ResBlock(a, b, dropout) for a, b in zip(widths, widths[1:], strict=False))
        self.attentions = nn.ModuleList(AttentionBlock(out_channels) for _ in range(num_blocks if attend else 0))
        self.resample = resample if resample is not None else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Apply each block, its attention if the level has any, and the resampling."""
        for index, block in enumerate(self.blocks):
            x = block(x)
            if len(self.attentions):
                x = self.attentions[index](x)
        return self.resample(x)


class Middle(nn.Module):
    """Residual block, attention, residual block at the lowest resolution."""

    def __init__(self, channels: int, dropout: float) -> None:
        super().__init__()
        self.block_1 = ResBlock(channels, channels, dropout)
        self.attention = AttentionBlock(channels)
        self.block_2 = ResBlock(channels, channels, dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the three blocks."""
        return self.block_2(self.attention(self.block_1(x)))


class Encoder(nn.Module):
    """Images (B, 3, H, W) to features (B, Z, H/f, W/f), f = `config.downsampling`."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        widths = [config.width * multiplier for multiplier in config.channel_multipliers]
        last = len(widths) - 1
        self.conv_in = conv3x3(3, config.width)
        self.levels = nn.ModuleList(
            Level(
                widths[max(level - 1, 0)] if level else config.width,
                widths[level],
                config.num_res_blocks,
                config.dropout,
                attend=level == last,
                resample=Downsample(widths[level]) if level < last else None,
            )
            for level in range(len(widths))
        )
        self.middle = Middle(widths[-1], config.dropout)
        self.norm_out = group_norm(widths[-1])
        self.conv_out = conv3x3(widths[-1], config.code_channels)

    def forward(self, images_B3HW: Tensor) -> Tensor:
        """Encode images in [-1, 1]."""
        x = self.conv_in(images_B3HW)
        for level in self.levels:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.middle(x))))


class Decoder(nn.Module):
    """Features (B, Z, h, w) to images (B, 3, f*h, f*w). `levels` is indexed by resolution, 0 is the full one."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        widths = [config.width * multiplier for multiplier in config.channel_multipliers]
        last = len(widths) - 1
        self.conv_in = conv3x3(config.code_channels, widths[-1])
        self.middle = Middle(widths[-1], config.dropout)
        self.levels = nn.ModuleList(
            Level(
                widths[min(level + 1, last)],
                widths[level],
                config.num_res_blocks + 1,
                config.dropout,
                attend=level == last,
                resample=Upsample(widths[level]) if level else None,
            )
            for level in range(len(widths))
        )
        self.norm_out = group_norm(widths[0])
        self.conv_out = conv3x3(widths[0], 3)

    def forward(self, f_BZhw: Tensor) -> Tensor:
        """Decode to images, not clamped."""
        x = self.middle(self.conv_in(f_BZhw))
        for level in reversed(self.levels):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


@torch.no_grad()
def init_weights(module: nn.Module) -> None:
    """Start convolutions from Xavier normal with zero bias, so that signal size is kept through the depth."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.xavier_normal_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
