"""Triton kernels of a step's own maps, of some hundred positions: resized, blended into f_hat, and read by the transformer.

What `varcli.tokenizer.quantizer` and a transformer's first layer say in torch, each in one launch: for one image the launches
are what takes time. Nothing here has gradients.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_PLACES, _OUTPUTS = 16, 4  # of a program that blends
_FEW_TOKENS = 4096  # of all samples: fewer are spread over the device, in smaller programs
_FEW_CHANNELS = 64  # with more, a large program does not fit the shared memory of consumer GPUs
_STRIDES = ["sample_stride", "channel_stride", "place_stride"]


@triton.jit(do_not_specialize=[*_STRIDES, "side", "target"])  # else each scale takes a second to compile
def _varcli_resize(
    x_ptr, weights_ptr, out_ptr, sample_stride, channel_stride, place_stride, side, target, BLOCK: tl.constexpr
):
    channel, sample = tl.program_id(0), tl.program_id(1).to(tl.int64)
    places = tl.arange(0, BLOCK)
    is_seen, is_wanted = places < side, places < target
    at = places[:, None] * side + places[None, :]
    x_ptr += sample * sample_stride + channel * channel_stride
    x = tl.load(x_ptr + at * place_stride, mask=is_seen[:, None] & is_seen[None, :], other=0).to(tl.float64)
    weights = tl.load(weights_ptr + at, mask=is_wanted[:, None] & is_seen[None, :], other=0).to(tl.float64)
    rows = tl.dot(weights, x, out_dtype=tl.float64)
    values = tl.dot(rows, weights.T, out_dtype=tl.float64).to(tl.float32)
    out_ptr += (sample * tl.num_programs(0) + channel) * target * target
    at = places[:, None] * target + places[None, :]
    tl.store(out_ptr + at, values, mask=is_wanted[:, None] & is_wanted[None, :])


@triton.jit
def _varcli_blend(
    f_hat_ptr, x_ptr, weight_ptr, bias_ptr, out_ptr, share,
    SIDE: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr, PLACES: tl.constexpr, OUTPUTS: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(2).to(tl.int64)
    outputs = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    places = tl.program_id(0) * PLACES + tl.arange(0, PLACES)
    row, column = places // SIDE, places % SIDE
    channels = tl.arange(0, BLOCK)
    is_place, is_channel, is_output = places < SIDE * SIDE, channels < CHANNELS, outputs < CHANNELS
    x_ptr += sample * CHANNELS * SIDE * SIDE
    terms = tl.zeros((OUTPUTS, BLOCK, PLACES), tl.float32)  # summed over input channels once, at the end
    for tap in tl.static_range(9):
        down, right = tap // 3 - 1, tap % 3 - 1
        is_seen = is_place & (row + down >= 0) & (row + down < SIDE) & (column + right >= 0) & (column + right < SIDE)
        at = channels[:, None] * SIDE * SIDE + (places + down * SIDE + right)[None, :]
        seen = tl.load(x_ptr + at, mask=is_channel[:, None] & is_seen[None, :], other=0)
        at = (outputs[:, None] * CHANNELS + channels[None, :]) * 9 + tap
        weight = tl.load(weight_ptr + at, mask=is_output[:, None] & is_channel[None, :], other=0)
        terms += weight[:, :, None] * seen[None, :, :]
    convolved = tl.sum(terms, axis=1) + tl.load(bias_ptr + outputs, mask=is_output, other=0)[:, None]
    inside = is_output[:, None] & is_place[None, :]
    at = outputs[:, None] * SIDE * SIDE + places[None, :]
    x = tl.load(x_ptr + at, mask=inside, other=0)
    at += sample * CHANNELS * SIDE * SIDE
    f_hat = tl.load(f_hat_ptr + at, mask=inside, other=0)
    tl.store(out_ptr + at, f_hat + (x * (1 - share) + convolved * share), mask=inside)


@triton.jit(do_not_specialize=[*_STRIDES, "length"])
def _varcli_embed(
    x_ptr, weight_ptr, bias_ptr, positions_ptr, out_ptr, sample_stride, place_stride, channel_stride, length,
    COPIES: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
    TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(2).to(tl.int64)
    tokens = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    channels = tl.arange(0, BLOCK)
    is_token, is_column, is_channel = tokens < length, columns < WIDTH, channels < CHANNELS
    at = sample * sample_stride + tokens[:, None] * place_stride + channels[None, :] * channel_stride
    x = tl.load(x_ptr + at, mask=is_token[:, None] & is_channel[None, :], other=0)
    at = columns[None, :] * CHANNELS + channels[:, None]
    weight = tl.load(weight_ptr + at, mask=is_channel[:, None] & is_column[None, :], other=0)
    values = tl.dot(x, weight, input_precision="ieee")
    values += tl.load(bias_ptr + columns, mask=is_column, other=0)[None, :]
    inside = is_token[:, None] & is_column[None, :]
    at = tokens[:, None] * WIDTH + columns[None, :]
    values += tl.load(positions_ptr + at, mask=inside, other=0)
    for copy in tl.static_range(COPIES):
        start = out_ptr + (copy * tl.num_programs(2) + sample) * length * WIDTH
        tl.store(start + at, values.to(out_ptr.dtype.element_ty), mask=inside)


def launch_resize(x_BZss: Tensor, weights_ts: Tensor) -> Tensor:
    """Return float32 square maps (B, Z, t, t), summed in float64: `weights @ x @ weights^T`. x: float32, of any strides."""
    batch, channels, side, _ = x_BZss.shape
    if x_BZss.stride(2) != side * x_BZss.stride(3):  # one stride leads from place to place, row after row
        x_BZss = x_BZss.contiguous()
    target = weights_ts.shape[0]
    block = max(16, triton.next_power_of_2(max(side, target)))
    out = torch.empty(batch, channels, target, target, device=x_BZss.device)
    with torch.cuda.device_of(out):
        _varcli_resize[(channels, batch)](
            x_BZss,
            weights_ts.contiguous(),
            out,
            *(x_BZss.stride(axis) for axis in (0, 1, 3)),
            side,
            target,
            BLOCK=block,
            num_warps=1 if block == 16 else 4,
        )
    return out


def launch_blend(f_hat_BZss: Tensor, x_BZss: Tensor, weight_ZZ33: Tensor, bias_Z: Tensor, share: float) -> Tensor:
    """Return f_hat + (1 - share) x + share (conv(x) + bias), (B, Z, s, s), all float32."""
    batch, channels, side, _ = f_hat_BZss.shape
    f_hat_BZss = f_hat_BZss.contiguous()
    out = torch.empty_like(f_hat_BZss)
    with torch.cuda.device_of(out):
        _varcli_blend[(triton.cdiv(side * side, _PLACES), triton.cdiv(channels, _OUTPUTS), batch)](
            f_hat_BZss,
            x_BZss.contiguous(),
            weight_ZZ33.contiguous(),
            bias_Z,
            out,
            share,
            SIDE=side,
            CHANNELS=channels,
            BLOCK=triton.next_power_of_2(channels),
            PLACES=_PLACES,
            OUTPUTS=_OUTPUTS,
        )
    return out


def launch_embed(
    x_BlZ: Tensor, weight_CZ: Tensor, bias_C: Tensor, positions_1lC: Tensor, copies: int, dtype: torch.dtype
) -> Tensor:
    """Return x @ weight^T + bias + positions, (copies * B, l, C) in `dtype`, all samples again for each copy.

    All is float32 until it is rounded; x may have any strides.
    """
    (batch, length, channels), width = x_BlZ.shape, len(weight_CZ)
    tokens, columns = embedded_at_once(batch * length, channels)
    out = torch.empty(copies * batch, length, width, dtype=dtype, device=x_BlZ.device)
    with torch.cuda.device_of(out):
        _varcli_embed[(triton.cdiv(length, tokens), triton.cdiv(width, columns), batch)](
            x_BlZ,
            weight_CZ.contiguous(),
            bias_C,
            positions_1lC.contiguous(),
            out,
            *x_BlZ.stride(),
            length,
            COPIES=copies,
            CHANNELS=channels,
            BLOCK=max(16, triton.next_power_of_2(channels)),
            WIDTH=width,
            TOKENS=tokens,
            COLUMNS=columns,
        )
    return out


def embedded_at_once(num_tokens: int, channels: int) -> tuple[int, int]:
    """Tokens and columns of a program that embeds."""
    return (64, 128) if num_tokens >= _FEW_TOKENS and channels <= _FEW_CHANNELS else (16, 64)
