"""Queries and keys of unit length out of one product, ready for an attention a step: one pass forward, one backward.

The gradients of the steps' keys and values overlap, as each step sees all earlier ones. They are added up as they are
read, so that no sum of them is stored. On CUDA Triton computes, on a CPU the formulas below.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from varcli.kernels.outputs import wide_dtype

_SHORTEST = 1e-12  # a shorter vector ends up shorter than a unit
_LONGEST_INVERSE = 0.999 / _SHORTEST  # of a vector that became a unit, whose gradient has no part along itself

Step = tuple[Tensor, Tensor, Tensor]  # queries (B, n, l, d) of a step, keys and values (B, n, L', d) up to its end

# -- what is computed ------------------------------------------------------------------------------------------------


def normalized_steps_reference(
    qkv_BLC: Tensor, q_bias_C: Tensor, v_bias_C: Tensor, log_scale: Tensor, cap: float, step_lengths: Sequence[int]
) -> list[Step]:
    """`normalized_steps` in plain torch."""
    wide, heads = wide_dtype(qkv_BLC), log_scale.numel()
    bias = torch.cat((q_bias_C, torch.zeros_like(q_bias_C), v_bias_C)).to(wide)
    q, k, v = (qkv_BLC.to(wide) + bias).unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    lengths = log_scale.to(wide).view(1, heads, 1, 1).clamp_max(cap).exp()
    q = q * (lengths / torch.linalg.vector_norm(q, dim=-1, keepdim=True).clamp_min(_SHORTEST))
    k = k / torch.linalg.vector_norm(k, dim=-1, keepdim=True).clamp_min(_SHORTEST)
    return _cut(*(part.to(qkv_BLC.dtype) for part in (q, k, v)), step_lengths)


def _cut(q_BnLd: Tensor, k_BnLd: Tensor, v_BnLd: Tensor, step_lengths: Sequence[int]) -> list[Step]:
    steps, start = [], 0
    for length in step_lengths:
        end = start + length
        steps.append((q_BnLd[:, :, start:end], k_BnLd[:, :, :end], v_BnLd[:, :, :end]))
        start = end
    return steps


# -- what is called --------------------------------------------------------------------------------------------------


def normalized_steps(
    qkv_BLC: Tensor, q_bias_C: Tensor, v_bias_C: Tensor, log_scale: Tensor, cap: float, step_lengths: Sequence[int]
) -> list[Step]:
    """Return what the attention of each step reads: queries of the step, keys and values of all tokens up to its end.

    qkv_BLC: (B, L, 3C), a product without its bias; float32 inside, its dtype out. log_scale: one entry a head; queries
    end up exp(min(log_scale, cap)) long, keys 1 long. Gradients of biases and log_scale are summed in float32.
    """
    return _NormalizedSteps.regroup(_NormalizedSteps.apply(qkv_BLC, q_bias_C, v_bias_C, log_scale, cap, step_lengths))


@torch.no_grad()
def normalize_into(
    qkv_BlC: Tensor,
    q_bias_C: Tensor,
    v_bias_C: Tensor,
    log_scale: Tensor,
    cap: float,
    k_Bnld: Tensor,
    v_Bnld: Tensor,
) -> Tensor:
    """Return queries (B, n, l, d) as `normalized_steps` does, and write keys and values to the room given; no gradients."""
    if qkv_BlC.is_cuda:
        from varcli.kernels.qk_triton import launch_into

        return launch_into(qkv_BlC, q_bias_C, v_bias_C, log_scale, cap, k_Bnld, v_Bnld).transpose(1, 2)
    q, k, v, *_ = _normalize_qkv_cpu(qkv_BlC, q_bias_C, v_bias_C, log_scale, cap)
    k_Bnld.copy_(k.transpose(1, 2))
    v_Bnld.copy_(v.transpose(1, 2))
    return q.transpose(1, 2)


class _NormalizedSteps(torch.autograd.Function):
    """What autograd cannot see: that the gradients of overlapping pieces are only ever needed as a sum."""

    @staticmethod
    def forward(ctx, qkv, q_bias, v_bias, log_scale, cap, step_lengths):
        q, k, v, q_inverse, k_inverse = torch.ops.varcli.normalize_qkv(qkv, q_bias, v_bias, log_scale, cap)
        ctx.save_for_backward(q, k, q_inverse, k_inverse, log_scale)
        ctx.cap, ctx.dtypes = cap, (q_bias.dtype, v_bias.dtype, log_scale.dtype)
        steps = _cut(*(part.transpose(1, 2) for part in (q, k, v)), step_lengths)
        return tuple(part for step in steps for part in step)

    @staticmethod
    def backward(ctx, *grads):
        pieces = [grad.transpose(1, 2) for grad in grads]
        grad_qkv, bias_sums, scale_sums = torch.ops.varcli.normalize_qkv_backward(
            pieces[0::3], pieces[1::3], pieces[2::3], *ctx.saved_tensors, ctx.cap
        )
        q_bias, v_bias, log_scale = ctx.dtypes
        grad_scale = scale_sums.view(ctx.saved_tensors[4].shape).to(log_scale)
        return grad_qkv, bias_sums[0].to(q_bias), bias_sums[1].to(v_bias), grad_scale, None, None

    @staticmethod
    def regroup(parts: tuple[Tensor, ...]) -> list[Step]:
        """Three by three, as a Function can return no tuples of tuples."""
        return list(zip(parts[0::3], parts[1::3], parts[2::3], strict=True))


# -- the operators: Triton on CUDA, these formulas on a CPU ------------------------------------------------------------


@torch.library.custom_op("varcli::normalize_qkv", mutates_args=(), device_types="cuda")
def _normalize_qkv(
    qkv: Tensor, q_bias: Tensor, v_bias: Tensor, log_scale: Tensor, cap: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    from varcli.kernels.qk_triton import launch_forward

    return launch_forward(qkv, q_bias, v_bias, log_scale, cap)


@_normalize_qkv.register_kernel("cpu")
def _normalize_qkv_cpu(
    qkv: Tensor, q_bias: Tensor, v_bias: Tensor, log_scale: Tensor, cap: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    wide, heads = wide_dtype(qkv), log_scale.numel()
    q, k, v = qkv.to(wide).unflatten(2, (3, heads, -1)).unbind(2)
    q, v = q + q_bias.view(heads, -1).to(wide), v + v_bias.view(heads, -1).to(wide)
    q_inverse, k_inverse = (1 / torch.linalg.vector_norm(x, dim=-1).clamp_min(_SHORTEST) for x in (q, k))
    lengths = log_scale.flatten().to(wide).clamp_max(cap).exp()
    q, k = q * (q_inverse * lengths).unsqueeze(-1), k * k_inverse.unsqueeze(-1)
    q, k, v = (x.to(qkv.dtype, memory_format=torch.contiguous_format, copy=True) for x in (q, k, v))
    return q, k, v, q_inverse, k_inverse


@_normalize_qkv.register_fake
def _normalize_qkv_shapes(
    qkv: Tensor, q_bias: Tensor, v_bias: Tensor, log_scale: Tensor, cap: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, length, channels = qkv.shape
    heads = log_scale.numel()
    q, k, v = (qkv.new_empty(batch, length, heads, channels // (3 * heads)) for _ in range(3))
    q_inverse, k_inverse = (qkv.new_empty(batch, length, heads, dtype=wide_dtype(qkv)) for _ in range(2))
    return q, k, v, q_inverse, k_inverse


@torch.library.custom_op("varcli::normalize_qkv_backward", mutates_args=(), device_types="cuda")
def _normalize_qkv_backward(
    grads_q: Sequence[Tensor],
    grads_k: Sequence[Tensor],
    grads_v: Sequence[Tensor],
    q: Tensor,
    k: Tensor,
    q_inverse: Tensor,
    k_inverse: Tensor,
    log_scale: Tensor,
    cap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    from varcli.kernels.qk_triton import launch_backward

    return launch_backward(grads_q, grads_k, grads_v, q, k, q_inverse, k_inverse, log_scale, cap)


@_normalize_qkv_backward.register_kernel("cpu")
def _normalize_qkv_backward_cpu(
    grads_q: Sequence[Tensor],
    grads_k: Sequence[Tensor],
    grads_v: Sequence[Tensor],
    q: Tensor,
    k: Tensor,
    q_inverse: Tensor,
    k_inverse: Tensor,
    log_scale: Tensor,
    cap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    wide = wide_dtype(q)
    grad_q = torch.cat(list(grads_q), dim=1).to(wide)
    grad_k, grad_v = (torch.zeros(k.shape, dtype=wide, device=k.device) for _ in range(2))
    for total, pieces in ((grad_k, grads_k), (grad_v, grads_v)):
        for piece in pieces:
            total[:, : piece.shape[1]] += piece
    log_scale = log_scale.flatten().to(wide)
    lengths = log_scale.clamp_max(cap).exp()
    along = (grad_q * q).sum(dim=-1)
    scale_sums = torch.where(log_scale <= cap, along.sum(dim=(0, 1)), 0)
    along = torch.where(q_inverse < _LONGEST_INVERSE, along / lengths.square(), 0).unsqueeze(-1)
    grad_q = (grad_q - q * along) * (q_inverse * lengths).unsqueeze(-1)
    along = torch.where(k_inverse < _LONGEST_INVERSE, (grad_k * k).sum(dim=-1), 0).unsqueeze(-1)
    grad_k = (grad_k - k * along) * k_inverse.unsqueeze(-1)
    bias_sums = torch.stack([grad.sum(dim=(0, 1)).flatten() for grad in (grad_q, grad_v)])
    return torch.stack((grad_q, grad_k, grad_v), dim=2).flatten(2).to(q.dtype), bias_sums, scale_sums


@_normalize_qkv_backward.register_fake
def _normalize_qkv_backward_shapes(
    grads_q: Sequence[Tensor],
    grads_k: Sequence[Tensor],
    grads_v: Sequence[Tensor],
    q: Tensor,
    k: Tensor,
    q_inverse: Tensor,
    k_inverse: Tensor,
    log_scale: Tensor,
    cap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, length, heads, width = q.shape
    grad_qkv = q.new_empty(batch, length, 3 * heads * width)
    return grad_qkv, q.new_empty(2, heads * width, dtype=wide_dtype(q)), q.new_empty(heads, dtype=wide_dtype(q))
