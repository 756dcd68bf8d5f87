"""Matrix products of numbers in FP8 (e4m3): about twice the rate of bfloat16, on GPUs that have it.

Every row of what is multiplied, along the contracted dimension, has a scale of its own, so that one large row costs no
other row its digits. The gradient to a weight stays a bfloat16 product: it sums over all tokens, whose gradients differ
most in size, and it is what training adds up. Features and weights are rounded in plain torch, which torch.compile joins to
what makes them; the gradients that come to `fp8_product`, whose rows may be 3C wide, by Triton, which reads a row once. On a
CPU the same rounded numbers are multiplied in float32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from varcli.devices import precision_name
from varcli.errors import ConfigError
from varcli.kernels import HAS_TRITON
from varcli.kernels.outputs import rows_like

# e4m3 for gradients too: with a scale a row they need its digits more than the reach of e5m2. The gradient of the model
# that comes with varcli, 8 of its own images in training mode, was off by 13.5 % with it and by 14.3 % with e5m2
_FP8 = torch.float8_e4m3fn
_LARGEST = torch.finfo(_FP8).max
_SMALLEST_ROW = 1e-30  # a row whose largest entry is less is rounded as if that were it; a zero row stays zero
_OLDEST_GPU = (8, 9)  # compute capability
_MULTIPLE = 16  # of sizes of a product


class Rounded(NamedTuple):
    """Features, and their rows as `round_rows` gives them, where what made the features made these on its way."""

    whole: Tensor  # (..., K) bfloat16
    rows_MK: Tensor  # FP8
    scales_M1: Tensor


def require_fp8(device: torch.device, dtype: torch.dtype, *widths: int) -> None:
    """Raise ConfigError unless a device has products in FP8, beside `dtype`, for layers of these widths."""
    if device.type != "cuda" or torch.version.hip or torch.cuda.get_device_capability(device) < _OLDEST_GPU:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        raise ConfigError(
            f"fp8 needs an NVIDIA GPU of compute capability 8.9 or later (L40S, H100), but the device is {name}",
            "leave it out; a run begun with it goes on in bf16 by `varcli train --no-fp8`",
        )
    if dtype != torch.bfloat16:
        raise ConfigError(f"fp8 goes with bf16, but the precision is {precision_name(dtype)}", "use --precision bf16")
    if any(width % _MULTIPLE for width in widths):
        sizes = ", ".join(map(str, widths))
        raise ConfigError(f"fp8 needs layers whose widths are multiples of {_MULTIPLE}, but they are {sizes}")


def fp8_product(x: Tensor | Rounded, weight_NK: Tensor) -> Tensor:
    """Return x W^T, (..., N) bfloat16, of x (..., K), both rounded to FP8; so is the gradient to the result, for that to x.

    weight_NK: bfloat16 or float32; its gradient, of the same dtype, is the bfloat16 product of what was not rounded.
    Source: rowwise scaling with the weights' gradients in high precision, as in torchao's float8 training.
    """
    x, *rows = with_rows(x)
    return _Product.apply(x.flatten(0, -2), *rows, weight_NK).unflatten(0, x.shape[:-1])


def with_rows(x: Tensor | Rounded) -> Rounded:
    """Return features (..., K) in bfloat16 with their rows, which are made here if they are not there yet."""
    if isinstance(x, Rounded):
        return x
    x = x.to(torch.bfloat16)
    return Rounded(x, *round_rows(x.detach().flatten(0, -2)))


def round_rows(x_MK: Tensor) -> tuple[Tensor, Tensor]:
    """Return each row over its scale in FP8, (M, K) contiguous, and the scales (M, 1), float32: its largest entry / 448.

    What is not finite makes its row so.
    """
    scale_M1 = x_MK.abs().amax(dim=1, keepdim=True).float().clamp_min(_SMALLEST_ROW) / _LARGEST
    return (x_MK.float() / scale_M1).to(_FP8, memory_format=torch.contiguous_format), scale_M1


def scaled_product(a_MK: Tensor, a_scale_M1: Tensor, b_NK: Tensor, b_scale_N1: Tensor) -> Tensor:
    """Return a b^T, (M, N) bfloat16, of rows as `round_rows` gives them, summed in float32 or nearly so (use_fast_accum)."""
    if a_MK.device.type == "cuda":
        return torch._scaled_mm(
            a_MK, b_NK.t(), a_scale_M1, b_scale_N1.t(), out_dtype=torch.bfloat16, use_fast_accum=True
        )
    with torch.autocast(a_MK.device.type, enabled=False):
        return ((a_MK.float() * a_scale_M1) @ (b_NK.float() * b_scale_N1).t()).to(torch.bfloat16)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_MK, rows_MK, scales_M1, weight_NK):
        ctx.save_for_backward(x_MK, weight_NK)
        return scaled_product(rows_MK, scales_M1, *round_rows(weight_NK))

    @staticmethod
    def backward(ctx, grad_MN):
        x_MK, weight_NK = ctx.saved_tensors
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            round_gradient = torch.ops.varcli.round_rows if HAS_TRITON else round_rows
            grad_x = scaled_product(*round_gradient(grad_MN), *round_rows(weight_NK.t()))
        if ctx.needs_input_grad[3]:
            grad_weight = (grad_MN.t() @ x_MK).to(weight_NK.dtype)
        return grad_x, None, None, grad_weight


@torch.library.custom_op("varcli::round_rows", mutates_args=(), device_types="cuda")
def _round_rows(x_MK: Tensor) -> tuple[Tensor, Tensor]:
    from varcli.kernels.fp8_triton import launch_round

    return launch_round(x_MK)


@_round_rows.register_kernel("cpu")
def _round_rows_cpu(x_MK: Tensor) -> tuple[Tensor, Tensor]:
    return round_rows(x_MK)


@_round_rows.register_fake
def _round_rows_shapes(x_MK: Tensor) -> tuple[Tensor, Tensor]:
    return rows_like(x_MK)
