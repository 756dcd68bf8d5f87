"""A 3x3 convolution to a number of channels that libraries' tiles do not fit, in one pass with what stands around it.

That is the normalisation and SiLU of what it reads, its bias and skip path, and the moments of the result. cuDNN computes 160
channels in tiles of 128, so that three eighths of its work is thrown away. An operator as those of
`varcli.kernels.group_norm`: half precision with channels last, float32 inside, rounded once, without gradients; CUDA C++ on
the GPUs it was written for, the formula on a CPU.
"""

from __future__ import annotations

import functools
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor

from varcli.kernels import HAS_TRITON
from varcli.kernels.group_norm import maps_of, moments_of, tokens_of
from varcli.kernels.nvrtc import is_nvrtc_there
from varcli.kernels.outputs import stored, wide_dtype

COLUMNS = 160  # output channels of a block, whose number is a multiple of it
DEPTH = 32  # input channels at a time, whose number is a multiple of it
TILE_WIDTH = 64  # neighbouring positions of a row that a block computes, in two or four rows
_MANY_TILES = 264  # of four rows: two rounds of an H100; fewer are cut in two
_OUT = 160  # output channels of what gains; 320 do not, in all
_CAPABILITY = (9, 0)  # of the GPUs it was written for: H100


def is_gain(in_channels: int, out_channels: int, height: int, width: int, device: torch.device) -> bool:
    """Say whether `conv3x3` computes maps of this size, and faster than libraries do."""
    is_small = height * width * max(in_channels, out_channels) < 2**31  # a block counts a map's values in int32
    fits = height % 2 == 0 and width % TILE_WIDTH == 0 and is_small
    return fits and are_gain(in_channels, out_channels, device)


def are_gain(in_channels: int, out_channels: int, device: torch.device) -> bool:
    """Say whether there are maps of these channels for which `is_gain` says so."""
    return in_channels % DEPTH == 0 and out_channels == _OUT and _is_served(device)


def packed(weight_OC33: Tensor) -> Tensor:
    """The weight as a block reads it: its columns, a chunk of channels, a tap, then 8 channels of each column.

    (O / 160, C / 32, 9, 4, 160, 8), contiguous.
    """
    weight = weight_OC33.flatten(2).unflatten(1, (-1, DEPTH // 8, 8)).unflatten(0, (-1, COLUMNS))
    return weight.permute(0, 2, 5, 3, 1, 4).contiguous()


def _unpacked(weight: Tensor) -> Tensor:
    """What `packed` was given."""
    return weight.permute(0, 4, 1, 3, 5, 2).flatten(2, 4).flatten(0, 1).unflatten(2, (3, 3))


def tile_rows(batch: int, height: int, width: int, out_channels: int) -> int:
    """Rows of a tile: two, or four, of which less is read, where there are enough for the whole device."""
    tiles = batch * (height // 4) * (width // TILE_WIDTH) * (out_channels // COLUMNS)
    return 4 if height % 4 == 0 and tiles >= _MANY_TILES else 2


def num_sums(batch: int, height: int, width: int, out_channels: int) -> int:
    """Partial sums of each map: two a tile."""
    return 2 * (height // tile_rows(batch, height, width, out_channels)) * (width // TILE_WIDTH)


def _is_served(device: torch.device) -> bool:
    if device.type != "cuda":
        return True
    return torch.cuda.get_device_capability(device) == _CAPABILITY and HAS_TRITON and is_nvrtc_there()


@functools.cache
def introduce() -> None:
    """Let torch.compile meet the operators of maps alone, before it meets them deep in a tokenizer's encoder or decoder.

    And let it ask which GPU it is without breaking its graph.

    At the first meeting torch 2.11 writes out all that an operator's inputs came from, for a log: a text that every residual
    block doubles, so that it did not end within minutes. 2.14 writes it when the log is read.
    """
    torch.compiler.assume_constant_result(_is_served)  # here, since it brings the compiler, which takes seconds
    sides = 2, TILE_WIDTH
    maps, weight = torch.zeros(1, 2 * TILE_WIDTH, DEPTH), packed(torch.zeros(COLUMNS, DEPTH, 3, 3))
    bias, phase_bias = torch.zeros(DEPTH), torch.zeros(DEPTH // 4)

    def each(maps, weight, bias, phase_bias):
        operators = torch.ops.varcli
        return (
            operators.conv3x3(maps, weight, None, None, None, None, *sides),
            operators.channel_sums(maps, None),
            operators.add_residual(maps, None, bias),
            operators.add_with_margin(maps, maps, bias, *sides),
            operators.interleave_phases(maps, phase_bias, sides[0] - 1, sides[1] - 1),
            operators.scale_and_shift(maps, bias[None], bias[None], True),
        )

    # what comes from a cache is not met, and torch warns that there is none
    with warnings.catch_warnings(action="ignore"), torch.compiler.config.patch(force_disable_caches=True):
        torch.compile(each, dynamic=False)(maps, weight, bias, phase_bias)


def conv3x3(
    maps_BChw: Tensor,
    weight: Tensor,
    bias_O: Tensor | None = None,
    skip_BOhw: Tensor | None = None,
    factors: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Return conv(maps) + bias + skip, (B, O, h, w) in the dtype of `maps`, and the moments of that.

    For the sizes of which `is_gain` says so. weight: (O, C, 3, 3), or that `packed`; rounded to the maps' dtype. factors: scale
    and shift (B, C), float32, for conv(SiLU(maps * scale + shift)), whose argument is rounded to the maps' dtype.
    """
    skip = None if skip_BOhw is None else tokens_of(skip_BOhw)
    sides = maps_BChw.shape[2:]
    weight = weight.to(maps_BChw.dtype)
    weight = packed(weight) if weight.ndim == 4 else weight
    tokens, sums = torch.ops.varcli.conv3x3(
        tokens_of(maps_BChw), weight, bias_O, skip, *(factors or (None, None)), *sides
    )
    out = maps_of(tokens, sides)
    return out, moments_of(sums, out)


@torch.library.custom_op("varcli::conv3x3", mutates_args=(), device_types="cuda")
def _conv3x3(
    tokens: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    skip: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    height: int,
    width: int,
) -> tuple[Tensor, Tensor]:
    from varcli.kernels.conv3x3_cuda import launch_conv3x3

    return launch_conv3x3(tokens, weight, bias, skip, scale, shift, height, width)


@_conv3x3.register_kernel("cpu")
def _conv3x3_cpu(
    tokens: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    skip: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    height: int,
    width: int,
) -> tuple[Tensor, Tensor]:
    wide = wide_dtype(tokens)
    if scale is not None:
        tokens = torch.ops.varcli.scale_and_shift(tokens, scale, shift, True)
    maps = tokens.transpose(1, 2).unflatten(2, (height, width)).to(wide)
    bias = None if bias is None else bias.to(wide)
    values = F.conv2d(maps, _unpacked(weight).to(wide), bias, padding=1).flatten(2).transpose(1, 2)
    out = stored(values if skip is None else values + skip, tokens.dtype)
    parts = out.to(wide).unflatten(1, (num_sums(len(tokens), height, width, out.shape[2]), -1))
    return out, torch.stack([parts.sum(dim=2), parts.square().sum(dim=2)], dim=2)


@_conv3x3.register_fake
def _conv3x3_shapes(
    tokens: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    skip: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    height: int,
    width: int,
) -> tuple[Tensor, Tensor]:
    batch, length, _ = tokens.shape
    wide = wide_dtype(tokens)
    outputs = weight.shape[0] * COLUMNS
    parts = num_sums(batch, height, width, outputs)
    return tokens.new_empty((batch, length, outputs)), tokens.new_empty((batch, parts, 2, outputs), dtype=wide)
