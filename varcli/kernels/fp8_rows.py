"""What is read by products in FP8 alone, and only ever in FP8: weights that are kept so, and features without gradients.

While sampling, each pass before such a product leaves the rows that it reads and nothing else. On CUDA Triton computes the
passes, on a CPU the formulas below.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from varcli.kernels.fp8 import round_rows, scaled_product
from varcli.kernels.gelu import biased_gelu
from varcli.kernels.norm import gated_norm, norm
from varcli.kernels.outputs import rows_like


class Rows(NamedTuple):
    """Features (..., K) whose rows are in FP8, as `round_rows` gives them."""

    values: Tensor  # (..., K) FP8
    scales: Tensor  # (..., 1) float32


@torch.no_grad()
def rows_product(x: Rows, weight_NK: Tensor, scales_N1: Tensor) -> Tensor:
    """Return x W^T, (..., N) bfloat16, of a weight's rows as `round_rows` gives them."""
    y_MN = scaled_product(x.values.flatten(0, -2), x.scales.flatten(0, -2), weight_NK, scales_N1)
    return y_MN.unflatten(0, x.values.shape[:-1])


@torch.no_grad()
def plain_rows(x: Tensor) -> Rows:
    """Return the rows of x (..., K), after it was rounded to bfloat16; in plain torch, for torch.compile to join."""
    return _shaped(*round_rows(x.to(torch.bfloat16).flatten(0, -2)), x)


@torch.no_grad()
def to_rows(x: Tensor) -> Rows:
    """Return the rows of x (..., K), bfloat16."""
    if x.is_cuda:
        from varcli.kernels.fp8_triton import launch_round

        return _shaped(*launch_round(x.flatten(0, -2)), x)
    return plain_rows(x)


@torch.no_grad()
def norm_to_rows(
    stream_BLC: Tensor,
    branch_BLC: Tensor | None,
    bias_C: Tensor | None,
    gate_B1C: Tensor | None,
    scale_B1C: Tensor,
    shift_B1C: Tensor,
    eps: float,
) -> tuple[Tensor, Rows]:
    """Return what `varcli.kernels.norm.gated_norm` does, or `norm` without a branch, of the norm its rows alone.

    The rows are those of the norm as it would be stored.
    """
    if stream_BLC.is_cuda:
        from varcli.kernels.norm_triton import launch_forward

        rows = rows_like(stream_BLC)
        vectors = (scale_B1C, shift_B1C, eps)
        out_BLC = launch_forward(stream_BLC, branch_BLC, bias_C, gate_B1C, *vectors, *rows, keeps=False)[0]
        return out_BLC, _shaped(*rows, stream_BLC)
    if branch_BLC is None:
        return stream_BLC, plain_rows(norm(stream_BLC, scale_B1C, shift_B1C, eps))
    out_BLC, normed_BLC = gated_norm(stream_BLC, branch_BLC, bias_C, gate_B1C, scale_B1C, shift_B1C, eps)
    return out_BLC, plain_rows(normed_BLC)


@torch.no_grad()
def gelu_to_rows(before: Tensor, bias_H: Tensor) -> Rows:
    """Return the rows of gelu(before + bias), (..., H), as it would be stored."""
    if before.is_cuda:
        from varcli.kernels.gelu_triton import launch_forward

        return _shaped(*launch_forward(before, bias_H, rounds=True, keeps=False)[1:], before)
    return plain_rows(biased_gelu(before, bias_H))


def _shaped(rows_MK: Tensor, scales_M1: Tensor, like: Tensor) -> Rows:
    return Rows(*(part.unflatten(0, like.shape[:-1]) for part in (rows_MK, scales_M1)))
