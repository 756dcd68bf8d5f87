"""Block-causal attention over one product of queries, keys and values, whose gradient comes back to that product.

Each token sees its own step and all earlier ones. Queries and keys are brought to unit length first, as `varcli.kernels.qk`
does; going back, each program that sums a token's gradient also takes it through that normalisation. On CUDA Triton
computes, on a CPU the formulas below.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from varcli.kernels import qk
from varcli.kernels.outputs import wide_dtype

_WIDTHS = (16, 32, 64)  # of a head: powers of 2 that leave a multiprocessor room for several programs


def is_served(dtype: torch.dtype, head_width: int) -> bool:
    """Say whether `attend` and `attend_step` compute heads of this width in this dtype on CUDA."""
    return dtype in (torch.bfloat16, torch.float16) and head_width in _WIDTHS


def attend(
    qkv_BLC: Tensor,
    q_bias_C: Tensor,
    v_bias_C: Tensor,
    log_scale: Tensor,
    cap: float,
    step_lengths: Sequence[int],
    scale: float,
) -> Tensor:
    """Return what each token sees, (B, L, C), all heads beside one another, in the dtype of `qkv_BLC`.

    qkv_BLC: (B, L, 3C), a product without its bias. log_scale: one entry a head; queries are exp(min(log_scale, cap)) long,
    keys 1 long. scale: of the softmax. Gradients of biases and log_scale are summed in float32. On CUDA for dtypes and head
    widths of which `is_served` says so.
    """
    assert sum(step_lengths) == qkv_BLC.shape[1], (step_lengths, qkv_BLC.shape)
    return _Attend.apply(qkv_BLC, q_bias_C, v_bias_C, log_scale, cap, tuple(step_lengths), scale)


@torch.no_grad()
def attend_step(
    qkv_BlC: Tensor,
    q_bias_C: Tensor,
    v_bias_C: Tensor,
    log_scale: Tensor,
    cap: float,
    k_BnLd: Tensor,
    v_BnLd: Tensor,
    scale: float,
    is_early: bool = False,
) -> Tensor:
    """Return what the l tokens of a step see of all L so far, (B, l, C); no gradients. Else as `attend`.

    k_BnLd, v_BnLd: a cache, (B, n, L, d) each of equal strides, in whose last l places the step's keys and values are written;
    the earlier keys are 1 long. is_early: on CUDA, launched as `few_rows_triton` says.
    """
    if qkv_BlC.is_cuda:
        from varcli.kernels.attention_step_triton import launch_step

        return launch_step(qkv_BlC, q_bias_C, v_bias_C, log_scale, cap, k_BnLd, v_BnLd, scale, is_early).flatten(2)
    places = (cache[:, :, cache.shape[2] - qkv_BlC.shape[1] :] for cache in (k_BnLd, v_BnLd))
    q_Bnld = qk.normalize_into(qkv_BlC, q_bias_C, v_bias_C, log_scale, cap, *places)
    return F.scaled_dot_product_attention(q_Bnld, k_BnLd, v_BnLd, scale=scale).transpose(1, 2).flatten(2)


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, q_bias, v_bias, log_scale, cap, step_lengths, scale):
        q, k, v, *inverses = torch.ops.varcli.normalize_qkv(qkv, q_bias, v_bias, log_scale, cap)
        out, level = torch.ops.varcli.attend(q, k, v, step_lengths, scale)
        ctx.save_for_backward(q, k, v, out, level, *inverses, log_scale)
        ctx.constants = cap, step_lengths, scale
        ctx.dtypes = q_bias.dtype, v_bias.dtype, log_scale.dtype
        return out.flatten(2)

    @staticmethod
    def backward(ctx, grad_out):
        q = ctx.saved_tensors[0]
        grad_out = grad_out.view(q.shape)
        grad_qkv, bias_sums, scale_sums = torch.ops.varcli.attend_backward(grad_out, *ctx.saved_tensors, *ctx.constants)
        q_bias, v_bias, log_scale = ctx.dtypes
        grad_scale = scale_sums.view(ctx.saved_tensors[-1].shape).to(log_scale)
        return grad_qkv, bias_sums[0].to(q_bias), bias_sums[1].to(v_bias), grad_scale, None, None, None


# -- the operators: Triton on CUDA, these formulas on a CPU ------------------------------------------------------------


@torch.library.custom_op("varcli::attend", mutates_args=(), device_types="cuda")
def _attend(q: Tensor, k: Tensor, v: Tensor, step_lengths: Sequence[int], scale: float) -> tuple[Tensor, Tensor]:
    """What is seen, (B, L, n, d), and for the way back the log of the softmax's sum, (B, n, L): to base 2 on CUDA, else e."""
    from varcli.kernels.attention_triton import launch_forward

    return launch_forward(q.contiguous(), k.contiguous(), v.contiguous(), tuple(step_lengths), scale)


@_attend.register_kernel("cpu")
@torch.autocast("cpu", enabled=False)
def _attend_cpu(q: Tensor, k: Tensor, v: Tensor, step_lengths: Sequence[int], scale: float) -> tuple[Tensor, Tensor]:
    q_wide, k_wide, v_wide = (part.to(wide_dtype(q)).transpose(1, 2) for part in (q, k, v))
    level = torch.logsumexp(_scores(q_wide, k_wide, step_lengths, scale), dim=-1)
    out = (_scores(q_wide, k_wide, step_lengths, scale) - level.unsqueeze(-1)).exp() @ v_wide
    return out.transpose(1, 2).to(q.dtype).contiguous(), level


@_attend.register_fake
def _attend_shapes(q: Tensor, k: Tensor, v: Tensor, step_lengths: Sequence[int], scale: float) -> tuple[Tensor, Tensor]:
    batch, length, heads, _ = q.shape
    return torch.empty_like(q), q.new_empty(batch, heads, length, dtype=wide_dtype(q))


def _scores(q_Bnld: Tensor, k_Bnld: Tensor, step_lengths: Sequence[int], scale: float) -> Tensor:
    """Scores (B, n, L, L), those of hidden keys -inf."""
    steps_L = torch.repeat_interleave(torch.tensor(step_lengths, device=q_Bnld.device))
    is_hidden = steps_L.unsqueeze(1) < steps_L
    return (q_Bnld @ k_Bnld.transpose(2, 3) * scale).masked_fill(is_hidden, float("-inf"))


@torch.library.custom_op("varcli::attend_backward", mutates_args=(), device_types="cuda")
def _attend_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    level: Tensor,
    q_inverse: Tensor,
    k_inverse: Tensor,
    log_scale: Tensor,
    cap: float,
    step_lengths: Sequence[int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    from varcli.kernels.attention_backward_triton import launch_backward

    tensors = (grad_out, q, k, v, out, level, q_inverse, k_inverse, log_scale)
    return launch_backward(*(tensor.contiguous() for tensor in tensors), cap, tuple(step_lengths), scale)


@_attend_backward.register_kernel("cpu")
@torch.autocast("cpu", enabled=False)
def _attend_backward_cpu(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    level: Tensor,
    q_inverse: Tensor,
    k_inverse: Tensor,
    log_scale: Tensor,
    cap: float,
    step_lengths: Sequence[int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    wide = wide_dtype(q)
    grad, q_wide, k_wide, v_wide, out_wide = (x.to(wide).transpose(1, 2) for x in (grad_out, q, k, v, out))
    weights = (_scores(q_wide, k_wide, step_lengths, scale) - level.unsqueeze(-1)).exp()
    along = (grad * out_wide).sum(dim=-1, keepdim=True)
    grad_scores = weights * (grad @ v_wide.transpose(2, 3) - along) * scale
    grads = (grad_scores @ k_wide, grad_scores.transpose(2, 3) @ q_wide, weights.transpose(2, 3) @ grad)
    pieces = ([part.transpose(1, 2)] for part in grads)
    # as one step of all tokens, whose gradients are whole
    return torch.ops.varcli.normalize_qkv_backward(*pieces, q, k, q_inverse, k_inverse, log_scale, cap)


@_attend_backward.register_fake
def _attend_backward_shapes(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    level: Tensor,
    q_inverse: Tensor,
    k_inverse: Tensor,
    log_scale: Tensor,
    cap: float,
    step_lengths: Sequence[int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, length, heads, width = q.shape
    grad_qkv = q.new_empty(batch, length, 3 * heads * width)
    wide = wide_dtype(q)
    return grad_qkv, q.new_empty(2, heads * width, dtype=wide), q.new_empty(heads, dtype=wide)
