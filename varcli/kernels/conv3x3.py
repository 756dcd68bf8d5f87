"""A 3x3 convolution to a number of channels that libraries' tiles do not fit, with bias, skip path and moments in one pass.

cuDNN computes 160 channels in tiles of 128, so that three eighths of its work is thrown away. An operator as those of
`varcli.kernels.group_norm`: half precision with channels last, float32 inside, rounded once, without gradients; Triton on
CUDA, the formula on a CPU.
"""

from __future__ import annotations

import functools
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor

from varcli.kernels.group_norm import maps_of, moments_of, tokens_of
from varcli.kernels.outputs import stored, wide_dtype

POSITIONS = 128  # of a map that are computed together, whose sums are one row of the partial sums
WIDE = 128  # of the output channels, the first; the others are a power of two
DEPTH = 32  # input channels at a time, whose number is a multiple of it
_OUT = 160  # output channels of what was timed; the kernel takes WIDE and any power of two from 16 on
_CAPABILITY = (9, 0)  # of the GPUs it was timed on: H100


def is_gain(in_channels: int, out_channels: int, positions: int, device: torch.device) -> bool:
    """Say whether `conv3x3` computes maps of so many positions, and faster than libraries do."""
    fits = out_channels == _OUT and in_channels % DEPTH == 0 and positions % POSITIONS == 0
    return fits and _is_timed_on(device)


def _is_timed_on(device: torch.device) -> bool:
    return device.type != "cuda" or torch.cuda.get_device_capability(device) == _CAPABILITY


@functools.cache
def introduce() -> None:
    """Let torch.compile meet the operators of maps alone, before it meets them deep in a tokenizer's encoder or decoder.

    And let it ask which GPU it is without breaking its graph.

    At the first meeting torch 2.11 writes out all that an operator's inputs came from, for a log: a text that every residual
    block doubles, so that it did not end within minutes. 2.14 writes it when the log is read.
    """
    torch.compiler.assume_constant_result(_is_timed_on)  # here, since it brings the compiler, which takes seconds
    sides = 8, POSITIONS // 8
    maps, weight = torch.zeros(1, POSITIONS, DEPTH), torch.zeros(9 * DEPTH, _OUT)
    bias, phase_bias = torch.zeros(DEPTH), torch.zeros(DEPTH // 4)

    def each(maps, weight, bias, phase_bias):
        operators = torch.ops.varcli
        return (
            operators.conv3x3(maps, weight, None, None, *sides),
            operators.channel_sums(maps, None),
            operators.add_residual(maps, None, bias),
            operators.add_with_margin(maps, maps, bias, *sides),
            operators.interleave_phases(maps, phase_bias, sides[0] - 1, sides[1] - 1),
            operators.scale_and_shift(maps, bias[None], bias[None], True),
        )

    # what comes from a cache is not met, and torch warns that there is none
    with warnings.catch_warnings(action="ignore"), torch.compiler.config.patch(force_disable_caches=True):
        torch.compile(each, dynamic=False)(maps, weight, bias, phase_bias)


def by_tap(weight_OC33: Tensor) -> Tensor:
    """Return an equal weight that lies in memory as the kernel reads it: taps, input channels, output channels."""
    return weight_OC33.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1)


def conv3x3(
    maps_BChw: Tensor, weight_OC33: Tensor, bias_O: Tensor | None = None, skip_BOhw: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return conv(maps) + bias + skip, (B, O, h, w) in the dtype of `maps`, and the moments of that.

    For the sizes of which `is_gain` says so. weight_OC33: rounded to the maps' dtype, and copied if it is not as `by_tap` says.
    """
    weight_KO = weight_OC33.to(maps_BChw.dtype).permute(2, 3, 1, 0).flatten(0, 2)
    skip = None if skip_BOhw is None else tokens_of(skip_BOhw)
    sides = maps_BChw.shape[2:]
    tokens, sums = torch.ops.varcli.conv3x3(tokens_of(maps_BChw), weight_KO, bias_O, skip, *sides)
    out = maps_of(tokens, sides)
    return out, moments_of(sums, out)


@torch.library.custom_op("varcli::conv3x3", mutates_args=(), device_types="cuda")
def _conv3x3(
    tokens: Tensor, weight: Tensor, bias: Tensor | None, skip: Tensor | None, height: int, width: int
) -> tuple[Tensor, Tensor]:
    from varcli.kernels.conv3x3_triton import launch_conv3x3

    return launch_conv3x3(tokens, weight, bias, skip, height, width)


@_conv3x3.register_kernel("cpu")
def _conv3x3_cpu(
    tokens: Tensor, weight: Tensor, bias: Tensor | None, skip: Tensor | None, height: int, width: int
) -> tuple[Tensor, Tensor]:
    wide = wide_dtype(tokens)
    maps = tokens.transpose(1, 2).unflatten(2, (height, width)).to(wide)
    taps = weight.unflatten(0, (3, 3, -1)).permute(3, 2, 0, 1).to(wide)
    values = F.conv2d(maps, taps, None if bias is None else bias.to(wide), padding=1).flatten(2).transpose(1, 2)
    out = stored(values if skip is None else values + skip, tokens.dtype)
    parts = out.to(wide).unflatten(1, (-1, POSITIONS))
    return out, torch.stack([parts.sum(dim=2), parts.square().sum(dim=2)], dim=2)


@_conv3x3.register_fake
def _conv3x3_shapes(
    tokens: Tensor, weight: Tensor, bias: Tensor | None, skip: Tensor | None, height: int, width: int
) -> tuple[Tensor, Tensor]:
    batch, length, _ = tokens.shape
    wide = wide_dtype(tokens)
    out = tokens.new_empty((batch, length, weight.shape[1]))
    return out, tokens.new_empty((batch, length // POSITIONS, 2, weight.shape[1]), dtype=wide)
