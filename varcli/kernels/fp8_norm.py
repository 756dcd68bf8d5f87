"""A gated branch added to the residual stream and the norm of the sum, which is also there in FP8: no pass of its own."""

from __future__ import annotations

import torch
from torch import Tensor

from varcli.kernels.fp8 import Rounded, round_rows
from varcli.kernels.norm import differentiate_gated_norm, keep_gated_norm
from varcli.kernels.outputs import dense_like, rows_like


def rounded_gated_norm(
    stream_BLC: Tensor,
    branch_BLC: Tensor,
    bias_C: Tensor | None,
    gate_B1C: Tensor,
    scale_B1C: Tensor,
    shift_B1C: Tensor,
    eps: float,
) -> tuple[Tensor, Rounded]:
    """Return what `varcli.kernels.norm.gated_norm` does, the norm with its rows in FP8."""
    inputs = (stream_BLC, branch_BLC, bias_C, gate_B1C, scale_B1C, shift_B1C, eps)
    out_BLC, normed_BLC, _, _, rows, scales = torch.ops.varcli.gated_norm_rows(*inputs)
    return out_BLC, Rounded(normed_BLC, rows, scales)


@torch.library.custom_op("varcli::gated_norm_rows", mutates_args=(), device_types="cuda")
def _gated_norm_rows(
    stream: Tensor, branch: Tensor, bias: Tensor | None, gate: Tensor, scale: Tensor, shift: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    from varcli.kernels.norm_triton import launch_forward

    rows = rows_like(stream)
    return *launch_forward(stream, branch, bias, gate, scale, shift, eps, *rows), *rows


@_gated_norm_rows.register_kernel("cpu")
def _gated_norm_rows_cpu(
    stream: Tensor, branch: Tensor, bias: Tensor | None, gate: Tensor, scale: Tensor, shift: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    made = torch.ops.varcli.gated_norm(stream, branch, bias, gate, scale, shift, eps)
    return *made, *round_rows(made[1].flatten(0, 1))


@_gated_norm_rows.register_fake
def _gated_norm_rows_shapes(
    stream: Tensor, branch: Tensor, bias: Tensor | None, gate: Tensor, scale: Tensor, shift: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    mean, inverse = (stream.new_empty(stream.shape[:2], dtype=torch.float32) for _ in range(2))
    return dense_like(stream), dense_like(stream), mean, inverse, *rows_like(stream)


def _keep(ctx, inputs, output) -> None:
    keep_gated_norm(ctx, inputs, output)
    ctx.mark_non_differentiable(*output[2:])


_gated_norm_rows.register_autograd(differentiate_gated_norm, setup_context=_keep)
