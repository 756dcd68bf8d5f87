"""The feed-forward layers of a block in FP8: what GELU and its gradient make is rounded on the way, in no pass of its own.

On CUDA Triton computes what stands between the products, on a CPU the formulas of `varcli.kernels.gelu`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from varcli.kernels.fp8 import Rounded, fp8_product, round_rows, scaled_product, with_rows
from varcli.kernels.gelu import biased_gelu
from varcli.kernels.outputs import dense_like, rows_like


def fp8_feed_forward(x: Tensor | Rounded, weight1_HC: Tensor, bias1_H: Tensor, weight2_CH: Tensor) -> Tensor:
    """Return gelu(x W1^T + bias) W2^T, (..., C) bfloat16, of x (..., C), with products as `fp8_product` takes them.

    The gradients to weights and bias have the dtype of these.
    """
    x, *rows = with_rows(x)
    y_MC = _FeedForward.apply(x.flatten(0, -2), *rows, weight1_HC, bias1_H, weight2_CH)
    return y_MC.unflatten(0, x.shape[:-1])


def fp8_feed_forward_reference(x: Tensor | Rounded, weight1_HC: Tensor, bias1_H: Tensor, weight2_CH: Tensor) -> Tensor:
    """`fp8_feed_forward` step by step."""
    return fp8_product(biased_gelu(fp8_product(x, weight1_HC), bias1_H), weight2_CH)


class _FeedForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, rows, scales, weight1, bias1, weight2):
        before = scaled_product(rows, scales, *round_rows(weight1))
        hidden, *hidden_rows = torch.ops.varcli.gelu_rows(before, bias1)
        ctx.save_for_backward(x, weight1, bias1, weight2, before, hidden)
        return scaled_product(*hidden_rows, *round_rows(weight2))

    @staticmethod
    def backward(ctx, grad):
        x, weight1, bias1, weight2, before, hidden = ctx.saved_tensors
        needs_x, _, _, needs_weight1, needs_bias1, needs_weight2 = ctx.needs_input_grad
        grad_x = grad_weight1 = grad_bias1 = grad_weight2 = None
        if needs_weight2:
            grad_weight2 = (grad.t() @ hidden).to(weight2.dtype)
        if needs_x or needs_weight1 or needs_bias1:
            grad_hidden = scaled_product(*round_rows(grad), *round_rows(weight2.t()))
            grad_before, sums, *rows = torch.ops.varcli.gelu_rows_backward(grad_hidden, before, bias1)
            if needs_x:
                grad_x = scaled_product(*rows, *round_rows(weight1.t()))
            if needs_weight1:
                grad_weight1 = (grad_before.t() @ x).to(weight1.dtype)
            if needs_bias1:
                grad_bias1 = sums.to(bias1.dtype)
        return grad_x, None, None, grad_weight1, grad_bias1, grad_weight2


# -- the operators: Triton on CUDA, these formulas on a CPU -----------------------------------------------------------


@torch.library.custom_op("varcli::gelu_rows", mutates_args=(), device_types="cuda")
def _gelu_rows(before: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    from varcli.kernels.gelu_triton import launch_forward

    return launch_forward(before, bias, rounds=True)


@_gelu_rows.register_kernel("cpu")
def _gelu_rows_cpu(before: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    result = biased_gelu(before, bias)
    return result, *round_rows(result)


@_gelu_rows.register_fake
def _gelu_rows_shapes(before: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return dense_like(before), *rows_like(before)


@torch.library.custom_op("varcli::gelu_rows_backward", mutates_args=(), device_types="cuda")
def _gelu_rows_backward(grad: Tensor, before: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from varcli.kernels.gelu_triton import launch_backward

    return launch_backward(grad, before, bias, rounds=True)


@_gelu_rows_backward.register_kernel("cpu")
def _gelu_rows_backward_cpu(grad: Tensor, before: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_before, grad_bias = torch.ops.varcli.biased_gelu_backward(grad, before, bias)
    return grad_before, grad_bias, *round_rows(grad_before)


@_gelu_rows_backward.register_fake
def _gelu_rows_backward_shapes(grad: Tensor, before: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_bias = before.new_empty(before.shape[-1], dtype=torch.float32)
    return dense_like(before), grad_bias, *rows_like(before)
