"""Group norms of half-precision maps: a pass that leaves the sums of what it stores, and one that normalises.

The passes are torch operators over tokens (B, N, C), the positions of a map with channels last: on CUDA Triton computes them,
on a CPU the formulas below, and torch.compile takes them as they are. They compute in float32, round once, and have no
gradients. Moments are the mean and the mean square of each channel: float32 (2, B, C).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from varcli.kernels.outputs import stored, wide_dtype

ROWS = 256  # positions whose sums are one row of the partial sums


def channel_moments(maps_BChw: Tensor, bias_C: Tensor | None = None) -> Tensor:
    """Return the moments of maps + bias."""
    return moments_of(torch.ops.varcli.channel_sums(tokens_of(maps_BChw), bias_C), maps_BChw)


def add_residual(maps_BChw: Tensor, branch_BChw: Tensor | None, bias_C: Tensor) -> tuple[Tensor, Tensor]:
    """Return maps + branch + bias, rounded to the maps' dtype, and the moments of that."""
    branch = None if branch_BChw is None else tokens_of(branch_BChw)
    out, sums = torch.ops.varcli.add_residual(tokens_of(maps_BChw), branch, bias_C)
    out = maps_of(out, maps_BChw.shape[2:])
    return out, moments_of(sums, out)


def add_residual_with_margin(maps_BChw: Tensor, branch_BChw: Tensor, bias_C: Tensor) -> Tensor:
    """Return maps + branch + bias with a row and a column of zeros after them: (B, C, h + 1, w + 1)."""
    height, width = maps_BChw.shape[2:]
    out = torch.ops.varcli.add_with_margin(tokens_of(maps_BChw), tokens_of(branch_BChw), bias_C, height, width)
    return maps_of(out, torch.Size((height + 1, width + 1)))


def interleave_phases(phases: Tensor, bias_C: Tensor) -> tuple[Tensor, Tensor]:
    """Put the maps (B, 4 * C, h + 1, w + 1) of four phases together to maps (B, C, 2h, 2w) with the bias, and their moments.

    Row 2i + a and column 2j + b are those of phase (a, b), number 2a + b, at row i + a and column j + b.
    """
    height, width = phases.shape[2] - 1, phases.shape[3] - 1
    out, sums = torch.ops.varcli.interleave_phases(tokens_of(phases), bias_C, height, width)
    out = maps_of(out, torch.Size((2 * height, 2 * width)))
    return out, moments_of(sums, out)


def scale_and_shift(maps_BChw: Tensor, scale_BC: Tensor, shift_BC: Tensor, is_activated: bool) -> Tensor:
    """Return maps * scale + shift, or the SiLU of that, in the maps' dtype. scale_BC, shift_BC: float32."""
    tokens = torch.ops.varcli.scale_and_shift(tokens_of(maps_BChw), scale_BC, shift_BC, is_activated)
    return maps_of(tokens, maps_BChw.shape[2:])


def tokens_of(maps: Tensor) -> Tensor:
    """(B, C, h, w) to (B, N, C); no copy if channels are last."""
    return maps.permute(0, 2, 3, 1).flatten(1, 2).contiguous()


def maps_of(tokens: Tensor, sides: torch.Size) -> Tensor:
    """(B, N, C) to (B, C, h, w) with channels last; sides: h and w."""
    # in this order: the other leaves open what the stride between samples is, of which one has any
    return tokens.unflatten(1, sides).permute(0, 3, 1, 2)


def moments_of(sums: Tensor, maps: Tensor) -> Tensor:
    """Partial sums (B, parts, 2, C) of the positions of such maps to their moments."""
    return sums.sum(dim=1).transpose(0, 1) / (maps.shape[2] * maps.shape[3])


# -- the operators: Triton on CUDA, these formulas on a CPU -------------------------------------------------------------


@torch.library.custom_op("varcli::channel_sums", mutates_args=(), device_types="cuda")
def _channel_sums(tokens: Tensor, bias: Tensor | None) -> Tensor:
    from varcli.kernels.group_norm_triton import launch_sums

    return launch_sums(tokens, bias)


@_channel_sums.register_kernel("cpu")
def _channel_sums_cpu(tokens: Tensor, bias: Tensor | None) -> Tensor:
    values = _sum(tokens, None, bias)
    parts = [torch.stack([part.sum(dim=1), part.square().sum(dim=1)], dim=1) for part in values.split(ROWS, dim=1)]
    return torch.stack(parts, dim=1)


@_channel_sums.register_fake
def _channel_sums_shape(tokens: Tensor, bias: Tensor | None) -> Tensor:
    return _sums_like(tokens, tokens.shape[1], tokens.shape[2])


@torch.library.custom_op("varcli::add_residual", mutates_args=(), device_types="cuda")
def _add_residual(tokens: Tensor, branch: Tensor | None, bias: Tensor) -> tuple[Tensor, Tensor]:
    from varcli.kernels.group_norm_triton import launch_residual

    return launch_residual(tokens, branch, bias)


@_add_residual.register_kernel("cpu")
def _add_residual_cpu(tokens: Tensor, branch: Tensor | None, bias: Tensor) -> tuple[Tensor, Tensor]:
    out = stored(_sum(tokens, branch, bias), tokens.dtype)
    return out, _channel_sums_cpu(out, None)


@_add_residual.register_fake
def _add_residual_shapes(tokens: Tensor, branch: Tensor | None, bias: Tensor) -> tuple[Tensor, Tensor]:
    return tokens.new_empty(tokens.shape), _sums_like(tokens, tokens.shape[1], tokens.shape[2])


@torch.library.custom_op("varcli::add_with_margin", mutates_args=(), device_types="cuda")
def _add_with_margin(tokens: Tensor, branch: Tensor, bias: Tensor, height: int, width: int) -> Tensor:
    from varcli.kernels.group_norm_triton import launch_margin

    return launch_margin(tokens, branch, bias, height, width)


@_add_with_margin.register_kernel("cpu")
def _add_with_margin_cpu(tokens: Tensor, branch: Tensor, bias: Tensor, height: int, width: int) -> Tensor:
    maps = _sum(tokens, branch, bias).to(tokens.dtype).unflatten(1, (height, width))
    return stored(F.pad(maps, (0, 0, 0, 1, 0, 1)).flatten(1, 2), tokens.dtype)


@_add_with_margin.register_fake
def _add_with_margin_shape(tokens: Tensor, branch: Tensor, bias: Tensor, height: int, width: int) -> Tensor:
    return tokens.new_empty((len(tokens), (height + 1) * (width + 1), tokens.shape[2]))


@torch.library.custom_op("varcli::interleave_phases", mutates_args=(), device_types="cuda")
def _interleave_phases(tokens: Tensor, bias: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    from varcli.kernels.group_norm_triton import launch_phases

    return launch_phases(tokens, bias, height, width)


@_interleave_phases.register_kernel("cpu")
def _interleave_phases_cpu(tokens: Tensor, bias: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    # two windows of rows and two of columns: window 1 belongs to phase 1
    windows = (
        tokens.unflatten(2, (2, 2, -1)).unflatten(1, (height + 1, width + 1)).unfold(1, height, 1).unfold(2, width, 1)
    )
    maps = windows.diagonal(dim1=1, dim2=3).diagonal(dim1=1, dim2=2)  # (B, C, h, w, row phase, column phase)
    dense = maps.permute(0, 2, 4, 3, 5, 1).reshape(len(tokens), 4 * height * width, -1)
    return _add_residual_cpu(dense, None, bias)


@_interleave_phases.register_fake
def _interleave_phases_shapes(tokens: Tensor, bias: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    batch, _, channels = tokens.shape
    length = 4 * height * width
    return tokens.new_empty((batch, length, channels // 4)), _sums_like(tokens, length, channels // 4)


@torch.library.custom_op("varcli::scale_and_shift", mutates_args=(), device_types="cuda")
def _scale_and_shift(tokens: Tensor, scale: Tensor, shift: Tensor, is_activated: bool) -> Tensor:
    from varcli.kernels.group_norm_triton import launch_scale

    return launch_scale(tokens, scale, shift, is_activated)


@_scale_and_shift.register_kernel("cpu")
def _scale_and_shift_cpu(tokens: Tensor, scale: Tensor, shift: Tensor, is_activated: bool) -> Tensor:
    values = tokens.to(wide_dtype(tokens)) * scale.unsqueeze(1) + shift.unsqueeze(1)
    return stored(F.silu(values) if is_activated else values, tokens.dtype)


@_scale_and_shift.register_fake
def _scale_and_shift_shape(tokens: Tensor, scale: Tensor, shift: Tensor, is_activated: bool) -> Tensor:
    return tokens.new_empty(tokens.shape)


def _sum(tokens: Tensor, branch: Tensor | None, bias: Tensor | None) -> Tensor:
    values = tokens.to(wide_dtype(tokens))
    for other in (branch, bias):
        values = values if other is None else values + other
    return values


def _sums_like(tokens: Tensor, length: int, channels: int) -> Tensor:
    return tokens.new_empty((len(tokens), -(-length // ROWS), 2, channels), dtype=wide_dtype(tokens))
