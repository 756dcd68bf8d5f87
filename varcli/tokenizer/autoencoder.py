"""The convolutional encoder and decoder around the quantizer.

Blocks compute one function in two ways. `forward` is the formula. `fused_forward`, for half precision on CUDA without gradients
and under torch.compile, takes and returns maps together with their moments, those of `varcli.kernels.group_norm`: whatever
stores a map for the last time, with biases and residuals added, leaves them to the norm that comes next.

Source: the VQGAN autoencoder (arXiv:2012.09841) in the sizes of VAR (arXiv:2404.02905).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from varcli.kernels.conv3x3 import are_gain, is_gain, packed
from varcli.kernels.conv3x3 import conv3x3 as fused_conv3x3
from varcli.kernels.group_norm import add_residual, add_residual_with_margin, channel_moments, scale_and_shift
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
        scale_BC, shift_BC = self.factors(torch.stack([x_float.mean(dim=(2, 3)), x_float.square().mean(dim=(2, 3))]))
        return (x_float * scale_BC[:, :, None, None] + shift_BC[:, :, None, None]).to(x.dtype)

    def fused_forward(
        self, x: Tensor, moments_2BC: Tensor, bias_C: Tensor | None = None, is_activated: bool = True
    ) -> Tensor:
        """Normalise x + bias, whose moments these are, then SiLU if wanted, in one pass."""
        return scale_and_shift(x, *self.factors(moments_2BC, bias_C), is_activated)

    def factors(self, moments_2BC: Tensor, bias_C: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Scale and shift (B, C), float32, that normalise x + bias, whose moments these are."""
        mean, square = moments_2BC.unflatten(2, (self.num_groups, -1)).mean(dim=3, keepdim=True)  # (B, groups, 1) each
        factor = torch.rsqrt((square - mean.square()).clamp(min=0) + self.eps)
        scale_BC = (factor * self.weight.view(self.num_groups, -1)).flatten(1)
        shift_BC = self.bias - (mean * factor * self.weight.view(self.num_groups, -1)).flatten(1)
        return scale_BC, shift_BC if bias_C is None else shift_BC + scale_BC * bias_C


def _is_fused(x: Tensor) -> bool:
    """Whether blocks go the fused way.

    Left to itself, torch.compile computes a norm's factors, and sums of residuals, anew for every value that needs them.
    """
    return x.is_cuda and is_half(x) and torch.compiler.is_compiling() and not torch.is_grad_enabled()


def _without_bias(convolution: nn.Conv2d, x: Tensor) -> Tensor:
    return F.conv2d(x, convolution.weight, padding=convolution.padding)


def _is_gain(convolution: nn.Conv2d, x: Tensor) -> bool:
    """Whether a 3x3 convolution of these maps is best computed by `fused_conv3x3`, with what follows it."""
    return is_gain(convolution.in_channels, convolution.out_channels, *x.shape[2:], x.device)


def _kept(weight: Tensor, packed_weight: Tensor | None) -> Tensor:
    return weight if packed_weight is None else packed_weight


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
        self.register_buffer("packed1", None, persistent=False)  # what `keep_packed_in` made
        self.register_buffer("packed2", None, persistent=False)

    @torch.no_grad()
    def keep_packed_in(self, dtype: torch.dtype) -> None:
        """Pack the weights of `fused_conv3x3` once: only for weights that do not change any more."""
        for name, convolution in (("packed1", self.conv1), ("packed2", self.conv2)):
            weight = convolution.weight
            if are_gain(convolution.in_channels, convolution.out_channels, weight.device):
                setattr(self, name, packed(weight.to(dtype)))

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block."""
        y = self.conv1(F.silu(self.norm1(x)))
        y = self.conv2(self.dropout(F.silu(self.norm2(y))))
        return self.shortcut(x) + y

    def fused_forward(self, x: Tensor, moments_2BC: Tensor) -> tuple[Tensor, Tensor]:
        """Apply the block to maps with these moments; return the result and its moments."""
        skip, bias_C = self._skip_path(x)
        y, *normed = self._first(x, moments_2BC)
        if self._is_last_gain(y):
            return fused_conv3x3(y, _kept(self.conv2.weight, self.packed2), bias_C, skip, self.norm2.factors(*normed))
        return add_residual(skip, self._last(y, *normed), bias_C)

    def margin_forward(self, x: Tensor, moments_2BC: Tensor) -> Tensor:
        """Apply the block to maps with these moments; return the result with a row and a column of zeros after it."""
        skip, bias_C = self._skip_path(x)
        y, *normed = self._first(x, moments_2BC)
        if self._is_last_gain(y):
            y, _ = fused_conv3x3(y, _kept(self.conv2.weight, self.packed2), factors=self.norm2.factors(*normed))
            return add_residual_with_margin(skip, y, bias_C)
        return add_residual_with_margin(skip, self._last(y, *normed), bias_C)

    def _skip_path(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the block is added to, and the bias (C,) of both paths together."""
        if isinstance(self.shortcut, nn.Conv2d):
            return _without_bias(self.shortcut, x), self.conv2.bias + self.shortcut.bias
        return x, self.conv2.bias

    def _first(self, x: Tensor, moments_2BC: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the first convolution's maps, the moments that the second norm takes, and the bias that these maps lack."""
        if _is_gain(self.conv1, x):
            factors = self.norm1.factors(moments_2BC)
            return *fused_conv3x3(x, _kept(self.conv1.weight, self.packed1), self.conv1.bias, factors=factors), None
        y = _without_bias(self.conv1, self.norm1.fused_forward(x, moments_2BC))
        return y, channel_moments(y, self.conv1.bias), self.conv1.bias

    def _last(self, y: Tensor, moments_2BC: Tensor, missing_C: Tensor | None) -> Tensor:
        """Return the second convolution of such maps, without its bias."""
        return _without_bias(self.conv2, self.dropout(self.norm2.fused_forward(y, moments_2BC, missing_C)))

    def _is_last_gain(self, y: Tensor) -> bool:
        return _is_gain(self.conv2, y) and not (self.training and self.dropout.p)


class AttentionBlock(nn.Module):
    """Single-head self-attention over all positions of a map, with a residual path.

    `by_products`, off unless set: products and a softmax in place of one kernel. With 640 channels a head they take a third of
    its time for one map of 16 x 16 on an H100, two thirds for 64; in half precision scores are rounded, too.
    """

    def __init__(self, channels: int, config: TokenizerConfig) -> None:
        super().__init__()
        self.by_products = False
        self.norm = GroupNorm(channels, config)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block; the softmax scale is 1 / sqrt(channels)."""
        return x + self.proj_out(self._attend(self.norm(x)))

    def fused_forward(self, x: Tensor, moments_2BC: Tensor) -> tuple[Tensor, Tensor]:
        """Apply the block to maps with these moments; return the result and its moments."""
        y = self._attend(self.norm.fused_forward(x, moments_2BC, is_activated=False))
        return add_residual(x, _without_bias(self.proj_out, y), self.proj_out.bias)

    def _attend(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).flatten(2).transpose(1, 2)  # (B, hw, 3C), channel order q | k | v
        q, k, v = qkv.unsqueeze(1).chunk(3, dim=-1)
        if self.by_products:
            scale = q.shape[-1] ** -0.5
            # its part that rounds nothing, so that float16 scores do not overflow
            power = 2.0 ** math.floor(math.log2(scale))
            scores = ((q * power) @ k.transpose(2, 3)).float() * (scale / power)
            y = torch.softmax(scores, dim=-1).to(v.dtype) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v)
        return y.squeeze(1).transpose(1, 2).reshape(x.shape)


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

    def fused_forward(self, x: Tensor, moments_2BC: Tensor) -> tuple[Tensor, Tensor]:
        """Apply the level to maps with these moments; return the result and its moments."""
        for index, block in enumerate(self.blocks):
            if isinstance(self.resample, Downsample) and index == len(self.blocks) - 1:  # such a level has no attention
                return self.resample.fused_forward(block.margin_forward(x, moments_2BC))
            x, moments_2BC = block.fused_forward(x, moments_2BC)
            if len(self.attentions):
                x, moments_2BC = self.attentions[index].fused_forward(x, moments_2BC)
        return (x, moments_2BC) if isinstance(self.resample, nn.Identity) else self.resample.fused_forward(x)


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

    def fused_forward(self, x: Tensor, moments_2BC: Tensor) -> tuple[Tensor, Tensor]:
        """Apply them to maps with these moments; return the result and its moments."""
        for part in (self.block_1, self.attention, self.block_2):
            x, moments_2BC = part.fused_forward(x, moments_2BC)
        return x, moments_2BC


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
        if _is_fused(images_B3HW):
            return self.fused_forward(images_B3HW)
        x = self.conv_in(images_B3HW)
        for level in self.levels:
            x = _run_level(level, x, self.checkpointing)
        return self.conv_out(F.silu(self.norm_out(self.middle(x))))

    def fused_forward(self, images_B3HW: Tensor) -> Tensor:
        """Encode images, in the fused way."""
        x = self.conv_in.gathered_forward(images_B3HW)
        moments_2BC = channel_moments(x)
        for part in (*self.levels, self.middle):
            x, moments_2BC = part.fused_forward(x, moments_2BC)
        return self.conv_out(self.norm_out.fused_forward(x, moments_2BC))


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
        if _is_fused(f_BZhw):
            return self.conv_out(self.fused_blocks(f_BZhw))
        x = self.middle(self.conv_in(f_BZhw))
        for level in reversed(self.levels):
            x = _run_level(level, x, self.checkpointing)
        return self.conv_out(F.silu(self.norm_out(x)))

    def lay_out(self, dtype: torch.dtype) -> None:
        """Store weights, which do not change any more, as the fused way in `dtype` reads them; attend by products."""
        self.to(memory_format=torch.channels_last)
        for part in self.modules():
            if isinstance(part, ResBlock):
                part.keep_packed_in(dtype)
            elif isinstance(part, Upsample):
                part.keep_phases_in(dtype)
            elif isinstance(part, AttentionBlock):
                part.by_products = True

    def fused_blocks(self, f_BZhw: Tensor) -> Tensor:
        """All but the last convolution, in the fused way."""
        x, moments_2BC = add_residual(_without_bias(self.conv_in, f_BZhw), None, self.conv_in.bias)
        for part in (self.middle, *reversed(self.levels)):
            x, moments_2BC = part.fused_forward(x, moments_2BC)
        return self.norm_out.fused_forward(x, moments_2BC)


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
