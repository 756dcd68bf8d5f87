"""GELU (tanh form) of a product and its bias: what was before the bias is kept, the rest recomputed in the backward pass.

torch.compile would recompute as well; but the gradient of the bias costs it another pass over the largest activation of a
block. On CUDA Triton computes, on a CPU the formulas below.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from varcli.kernels.outputs import dense_like, wide_dtype

_ROOT = math.sqrt(2 / math.pi)
_CUBE = 0.044715


def biased_gelu(before: Tensor, bias_H: Tensor) -> Tensor:
    """Return gelu(before + bias), (..., H): float32 inside, the dtype of `before` out; the bias's gradient is float32."""
    return torch.ops.varcli.biased_gelu(before, bias_H)


def linear_gelu(x: Tensor, weight_HC: Tensor, bias_H: Tensor) -> Tensor:
    """Return gelu(x @ weight^T + bias), (..., H), in the precision of `weight`, or in autocast's if that is on.

    Where no gradient is wanted, the product in half precision on CUDA ends with the GELU, which then is no pass of its own.
    """
    is_half = weight_HC.dtype in (torch.float16, torch.bfloat16) and bias_H.dtype == weight_HC.dtype
    x = x.to(weight_HC.dtype)
    if x.is_cuda and is_half and not torch.is_grad_enabled():
        y = torch._addmm_activation(bias_H, x.flatten(0, -2), weight_HC.t(), use_gelu=True)  # cuBLAS's is the tanh form
        return y.unflatten(0, x.shape[:-1])
    return biased_gelu(F.linear(x, weight_HC), bias_H)


@torch.library.custom_op("varcli::biased_gelu", mutates_args=(), device_types="cuda")
def _biased_gelu(before: Tensor, bias: Tensor) -> Tensor:
    from varcli.kernels.gelu_triton import launch_forward

    return launch_forward(before, bias)[0]


@_biased_gelu.register_kernel("cpu")
def _biased_gelu_cpu(before: Tensor, bias: Tensor) -> Tensor:
    wide = wide_dtype(before)
    result = F.gelu(before.to(wide) + bias.to(wide), approximate="tanh")
    return result.to(before.dtype, memory_format=torch.contiguous_format)


@_biased_gelu.register_fake
def _biased_gelu_shapes(before: Tensor, bias: Tensor) -> Tensor:
    return dense_like(before)


@torch.library.custom_op("varcli::biased_gelu_backward", mutates_args=(), device_types="cuda")
def _biased_gelu_backward(grad: Tensor, before: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    from varcli.kernels.gelu_triton import launch_backward

    return launch_backward(grad, before, bias)[:2]


@_biased_gelu_backward.register_kernel("cpu")
def _biased_gelu_backward_cpu(grad: Tensor, before: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    wide = wide_dtype(before)
    x = before.to(wide) + bias.to(wide)
    share = torch.sigmoid(2 * _ROOT * (x + _CUBE * x**3))  # 0.5 * (1 + tanh(u)) is sigmoid(2 * u)
    slope = 2 * _ROOT * (1 + 3 * _CUBE * x.square())
    grad_x = grad.to(wide) * (share + x * share * (1 - share) * slope)
    return grad_x.to(before.dtype, memory_format=torch.contiguous_format), grad_x.flatten(0, -2).sum(dim=0)


@_biased_gelu_backward.register_fake
def _biased_gelu_backward_shapes(grad: Tensor, before: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return dense_like(before), before.new_empty(before.shape[-1], dtype=wide_dtype(before))


def _keep(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx, grad):
    before, bias = ctx.saved_tensors
    grad_before, grad_bias = torch.ops.varcli.biased_gelu_backward(grad, before, bias)
    return grad_before, grad_bias.to(bias.dtype)


_biased_gelu.register_autograd(_differentiate, setup_context=_keep)
