"""The convolutional encoder and decoder around the quantizer.

Source: the VQGAN autoencoder (arXiv:2012.09841) in the sizes of VAR (arXiv:2404.02905).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from varcli.tokenizer.base import TokenizerConfig
from varcli.tokenizer.convolutions import Downsample, ImageConv2d, Upsample, conv3x3, is_half


class GroupNorm(nn.GroupNorm):
    """The normalisation used throughout, eps 1e-6."""

    def __init__(self, channels: int, config: TokenizerConfig) -> None:
        super().__init__(config.norm_groups, channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (B, C, h, w) maps."""
        is_compiled = x.is_cuda and torch.compiler.is_compiling()
        return self.channelwise_forward(x) if is_compiled and is_half(x) else super().forward(x)

    def channelwise_forward(self, x: Tensor) -> Tensor:
        """Compute the same from float32 sums over each channel.

        torch.compile makes of it one pass for the sums and one for the rest, forward and backward, that leave channels
        last; torch's own operator turns the data around before and after.
        """
        x_float = x.float()
        moments = torch.stack([x_float.mean(dim=(2, 3)), x_float.square().mean(dim=(2, 3))])
        mean, square = moments.unflatten(2, (self.num_groups, -1)).mean(dim=3, keepdim=True)  # (B, groups, 1) each
        factor = torch.rsqrt((square - mean.square()).clamp(min=0) + self.eps)
        scale_BC = (factor * self.weight.view(self.num_groups, -1)).flatten(1)
        shift_BC = self.bias - (mean * factor * self.weight.view(self.num_groups, -1)).flatten(1)
        return (x_float * scale_BC[:, :, None, None] + shift_BC[:, :, None, None]).to(x.dtype)


class ResBlock(nn.Module):
    """Two normalised convolutions beside a skip path: (B, in, h, w) -> (B, out, h, w)."""

    def __init__(self, in_channels: int, out_channels: int, config: TokenizerConfig) -> None:
        super().__init__()
        self.norm1 = GroupNorm(in_channels, config)
        self.conv1 = conv3x3(in_channels, out_channels)
        self.norm2 = GroupNorm(out_channels, config)
        self.dropout = nn.Dropout(config.dropout)
        self.conv2 = conv3x3(out_channels, out_channels)
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block."""
        y = self.conv1(F.silu(self.norm1(x)))
        y = self.conv2(self.dropout(F.silu(self.norm2(y))))
        return self.shortcut(x) + y


class AttentionBlock(nn.Module):
    """Single-head self-attention over all positions of a map, with a residual path."""

    def __init__(self, channels: int, config: TokenizerConfig) -> None:
        super().__init__()
        self.norm = GroupNorm(channels, config)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block; the softmax scale is 1 / sqrt(channels)."""
        batch, channels, height, width = x.shape
        qkv = self.qkv(self.norm(x)).flatten(2).transpose(1, 2)  # (B, hw, 3C), channel order q | k | v
        q, k, v = qkv.unsqueeze(1).chunk(3, dim=-1)
        y = F.scaled_dot_product_attention(q, k, v).squeeze(1)
        return x + self.proj_out(y.transpose(1, 2).reshape(batch, channels, height, width))


class Level(nn.Module):
    """All blocks at one resolution, then an optional change of resolution."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        config: TokenizerConfig,
        num_blocks: int,
        attend: bool,
        resample: nn.Module | None,
    ) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * num_blocks
        self.blocks = nn.ModuleList(ResBlock(a, b, config) for a, b in zip(widths, widths[1:], strict=False))
        self.attentions = nn.ModuleList(
            AttentionBlock(out_channels, config) for _ in range(num_blocks if attend else 0)
        )
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

    def __init__(self, channels: int, config: TokenizerConfig) -> None:
        super().__init__()
        self.block_1 = ResBlock(channels, channels, config)
        self.attention = AttentionBlock(channels, config)
        self.block_2 = ResBlock(channels, channels, config)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the three blocks."""
        return self.block_2(self.attention(self.block_1(x)))


class Encoder(nn.Module):
    """Images (B, 3, H, W) to features (B, Z, H/f, W/f), f = `config.downsampling`. `levels[0]` is full resolution.

    `checkpointing`, off unless set: each level's activations are computed again for its gradients instead of kept.
    """

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.checkpointing = False
        widths = [config.width * multiplier for multiplier in config.channel_multipliers]
        last = len(widths) - 1
        self.conv_in = ImageConv2d(3, config.width)
        self.levels = nn.ModuleList()
        for level, width in enumerate(widths):
            in_channels = widths[level - 1] if level else config.width
            resample = Downsample(width) if level < last else None
            self.levels.append(Level(in_channels, width, config, config.num_res_blocks, level == last, resample))
        self.middle = Middle(widths[-1], config)
        self.norm_out = GroupNorm(widths[-1], config)
        self.conv_out = conv3x3(widths[-1], config.code_channels)

    def forward(self, images_B3HW: Tensor) -> Tensor:
        """Encode images in [-1, 1]."""
        x = self.conv_in(images_B3HW)
        for level in self.levels:
            x = _run_level(level, x, self.checkpointing)
        return self.conv_out(F.silu(self.norm_out(self.middle(x))))


class Decoder(nn.Module):
    """Features (B, Z, h, w) to images (B, 3, f*h, f*w). `levels[0]` is full resolution and comes last.

    `checkpointing`: as the encoder's.
    """

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.checkpointing = False
        widths = [config.width * multiplier for multiplier in config.channel_multipliers]
        last = len(widths) - 1
        self.conv_in = conv3x3(config.code_channels, widths[-1])
        self.middle = Middle(widths[-1], config)
        self.levels = nn.ModuleList()
        for level, width in enumerate(widths):
            in_channels = widths[min(level + 1, last)]
            resample = Upsample(width) if level else None
            self.levels.append(Level(in_channels, width, config, config.num_res_blocks + 1, level == last, resample))
        self.norm_out = GroupNorm(widths[0], config)
        self.conv_out = ImageConv2d(widths[0], 3)

    def forward(self, f_BZhw: Tensor) -> Tensor:
        """Decode to images, not clamped."""
        x = self.middle(self.conv_in(f_BZhw))
        for level in reversed(self.levels):
            x = _run_level(level, x, self.checkpointing)
        return self.conv_out(F.silu(self.norm_out(x)))


def _run_level(level: nn.Module, x: Tensor, checkpointing: bool) -> Tensor:
    if checkpointing and torch.is_grad_enabled():
        return checkpoint(level, x, use_reentrant=False)
    return level(x)


@torch.no_grad()
def init_weights(module: nn.Module) -> None:
    """Start convolutions from Xavier normal with zero bias, so that signal size is kept through the depth."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.xavier_normal_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
