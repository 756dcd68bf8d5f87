"""A gated branch added to the residual stream, and the modulated norm of the sum: one pass forward, one backward.

`gated_norm` and `norm` are torch operators: on CUDA Triton computes them, on a CPU the formulas below, and torch.compile
takes them as they are. The functions whose names end in `_reference` say in plain torch what they compute.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from varcli.kernels import is_launched
from varcli.kernels.outputs import dense_like, wide_dtype

# -- what is computed ------------------------------------------------------------------------------------------------


def norm_reference(stream_BLC: Tensor, scale_B1C: Tensor, shift_B1C: Tensor, eps: float) -> Tensor:
    """`norm` in plain torch."""
    wide = wide_dtype(stream_BLC)
    normed = F.layer_norm(stream_BLC.to(wide), (stream_BLC.shape[-1],), eps=eps)
    return torch.addcmul(shift_B1C.to(wide), normed, 1 + scale_B1C.to(wide)).to(stream_BLC.dtype)


def gated_norm_reference(
    stream_BLC: Tensor,
    branch_BLC: Tensor,
    bias_C: Tensor | None,
    gate_B1C: Tensor,
    scale_B1C: Tensor,
    shift_B1C: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """`gated_norm` in plain torch."""
    out = _add(stream_BLC, branch_BLC, bias_C, gate_B1C)
    return out, norm_reference(out, scale_B1C, shift_B1C, eps)


def _add(stream: Tensor, branch: Tensor, bias: Tensor | None, gate: Tensor) -> Tensor:
    wide = wide_dtype(stream)
    branch = branch.to(wide) if bias is None else branch.to(wide) + bias.to(wide)
    return torch.addcmul(stream.to(wide), branch, gate.to(wide)).to(stream.dtype)


# -- what is called --------------------------------------------------------------------------------------------------


def norm(stream_BLC: Tensor, scale_B1C: Tensor, shift_B1C: Tensor, eps: float) -> Tensor:
    """Layer norm without weights of its own, then the condition's scale and shift; float32 inside, the stream's dtype out."""
    call = _norm_on_gpu if is_launched(stream_BLC) else torch.ops.varcli.norm
    return call(stream_BLC, scale_B1C, shift_B1C, eps)[0]


def gated_norm(
    stream_BLC: Tensor,
    branch_BLC: Tensor,
    bias_C: Tensor | None,
    gate_B1C: Tensor,
    scale_B1C: Tensor,
    shift_B1C: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Return stream + gate * (branch + bias), and its modulated norm; float32 inside, the stream's dtype out.

    bias_C: that of the product which made the branch, whose gradient then costs no pass of its own; None for no bias. The
    norm is that of the sum as it is rounded to the stream's dtype. Gradients of all vectors are summed in float32.
    """
    call = _gated_norm_on_gpu if is_launched(stream_BLC) else torch.ops.varcli.gated_norm
    return call(stream_BLC, branch_BLC, bias_C, gate_B1C, scale_B1C, shift_B1C, eps)[:2]


# -- the operators: Triton on CUDA, these formulas on a CPU -------------------------------------------------------------


def _norm_on_gpu(stream: Tensor, scale: Tensor, shift: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    from varcli.kernels.norm_triton import launch_forward

    return launch_forward(stream, None, None, None, scale, shift, eps)[1:]


_norm = torch.library.custom_op("varcli::norm", _norm_on_gpu, mutates_args=(), device_types="cuda")


@_norm.register_kernel("cpu")
def _norm_cpu(stream: Tensor, scale: Tensor, shift: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    wide = wide_dtype(stream)
    variance, mean = torch.var_mean(stream.to(wide), dim=-1, correction=0)
    inverse = torch.rsqrt(variance + eps)
    unit = (stream.to(wide) - mean.unsqueeze(-1)) * inverse.unsqueeze(-1)
    return (unit * (1 + scale.to(wide)) + shift.to(wide)).to(stream.dtype), mean, inverse


@_norm.register_fake
def _norm_shapes(stream: Tensor, scale: Tensor, shift: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return dense_like(stream), *_statistics_like(stream)


@torch.library.custom_op("varcli::norm_backward", mutates_args=(), device_types="cuda")
def _norm_backward(
    grad_normed: Tensor, stream: Tensor, scale: Tensor, mean: Tensor, inverse: Tensor
) -> tuple[Tensor, Tensor]:
    from varcli.kernels.norm_triton import launch_backward

    grad_stream, _, sums = launch_backward(grad_normed, None, stream, None, None, None, scale, mean, inverse)
    return grad_stream, sums


@_norm_backward.register_kernel("cpu")
def _norm_backward_cpu(
    grad_normed: Tensor, stream: Tensor, scale: Tensor, mean: Tensor, inverse: Tensor
) -> tuple[Tensor, Tensor]:
    grad_stream, sums = _norm_gradient(grad_normed, stream, scale, mean, inverse)
    return grad_stream.to(stream.dtype), torch.stack(sums, dim=1)


@_norm_backward.register_fake
def _norm_backward_shapes(
    grad_normed: Tensor, stream: Tensor, scale: Tensor, mean: Tensor, inverse: Tensor
) -> tuple[Tensor, Tensor]:
    return dense_like(stream), _sums_like(stream, 2)


def _gated_norm_on_gpu(
    stream: Tensor, branch: Tensor, bias: Tensor | None, gate: Tensor, scale: Tensor, shift: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from varcli.kernels.norm_triton import launch_forward

    return launch_forward(stream, branch, bias, gate, scale, shift, eps)


_gated_norm = torch.library.custom_op("varcli::gated_norm", _gated_norm_on_gpu, mutates_args=(), device_types="cuda")


@_gated_norm.register_kernel("cpu")
def _gated_norm_cpu(
    stream: Tensor, branch: Tensor, bias: Tensor | None, gate: Tensor, scale: Tensor, shift: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    out = _add(stream, branch, bias, gate)
    return out, *_norm_cpu(out, scale, shift, eps)


@_gated_norm.register_fake
def _gated_norm_shapes(
    stream: Tensor, branch: Tensor, bias: Tensor | None, gate: Tensor, scale: Tensor, shift: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return dense_like(stream), dense_like(stream), *_statistics_like(stream)


@torch.library.custom_op("varcli::gated_norm_backward", mutates_args=(), device_types="cuda")
def _gated_norm_backward(
    grad_normed: Tensor,
    grad_out: Tensor,
    out: Tensor,
    branch: Tensor,
    bias: Tensor | None,
    gate: Tensor,
    scale: Tensor,
    mean: Tensor,
    inverse: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    from varcli.kernels.norm_triton import launch_backward

    return launch_backward(grad_normed, grad_out, out, branch, bias, gate, scale, mean, inverse)


@_gated_norm_backward.register_kernel("cpu")
def _gated_norm_backward_cpu(
    grad_normed: Tensor,
    grad_out: Tensor,
    out: Tensor,
    branch: Tensor,
    bias: Tensor | None,
    gate: Tensor,
    scale: Tensor,
    mean: Tensor,
    inverse: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    wide = wide_dtype(out)
    grad, sums = _norm_gradient(grad_normed, out, scale, mean, inverse)
    grad = grad + grad_out.to(wide)
    grad_branch = grad * gate.to(wide)
    if bias is None:
        sums = *sums, (grad * branch.to(wide)).sum(dim=1)
    else:
        sums = *sums, (grad * (branch.to(wide) + bias.to(wide))).sum(dim=1), grad_branch.sum(dim=1)
    return grad.to(out.dtype), grad_branch.to(branch.dtype), torch.stack(sums, dim=1)


@_gated_norm_backward.register_fake
def _gated_norm_backward_shapes(
    grad_normed: Tensor,
    grad_out: Tensor,
    out: Tensor,
    branch: Tensor,
    bias: Tensor | None,
    gate: Tensor,
    scale: Tensor,
    mean: Tensor,
    inverse: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    return dense_like(out), dense_like(branch), _sums_like(out, 3 if bias is None else 4)


def _norm_gradient(
    grad_normed: Tensor, stream: Tensor, scale: Tensor, mean: Tensor, inverse: Tensor
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Gradient to the normalised stream, and the sums over tokens for scale and shift, all wide."""
    wide = wide_dtype(stream)
    grad, inverse = grad_normed.to(wide), inverse.unsqueeze(-1)
    unit = (stream.to(wide) - mean.unsqueeze(-1)) * inverse
    sums = (grad * unit).sum(dim=1), grad.sum(dim=1)
    grad = grad * (1 + scale.to(wide))
    along = (grad * unit).mean(dim=-1, keepdim=True)
    return (grad - grad.mean(dim=-1, keepdim=True) - unit * along) * inverse, sums


def _statistics_like(stream: Tensor) -> tuple[Tensor, Tensor]:
    mean = stream.new_empty(stream.shape[:2], dtype=wide_dtype(stream))
    return mean, torch.empty_like(mean)


def _sums_like(stream: Tensor, kinds: int) -> Tensor:
    return stream.new_empty((stream.shape[0], kinds, stream.shape[2]), dtype=wide_dtype(stream))


# -- gradients -------------------------------------------------------------------------------------------------------


def _keep_norm(ctx, inputs, output) -> None:
    stream, scale, shift, _ = inputs
    ctx.save_for_backward(stream, scale, *output[1:])
    ctx.dtypes = scale.dtype, shift.dtype


def _differentiate_norm(ctx, grad_normed, *_):
    grad_stream, sums = torch.ops.varcli.norm_backward(grad_normed, *ctx.saved_tensors)
    grad_scale, grad_shift = (part.to(dtype) for part, dtype in zip(sums.split(1, dim=1), ctx.dtypes))
    return grad_stream, grad_scale, grad_shift, None


def keep_gated_norm(ctx, inputs, output) -> None:
    """Keep what `differentiate_gated_norm` needs; the inputs are `gated_norm`'s, the first four outputs its operator's."""
    _, branch, bias, gate, scale, shift, _ = inputs
    out, _, mean, inverse = output[:4]
    ctx.save_for_backward(out, branch, bias, gate, scale, mean, inverse)
    ctx.dtypes = scale.dtype, shift.dtype, gate.dtype


def differentiate_gated_norm(ctx, grad_out, grad_normed, *_):
    """Return the gradients to the inputs of `gated_norm`."""
    grad_stream, grad_branch, sums = torch.ops.varcli.gated_norm_backward(grad_normed, grad_out, *ctx.saved_tensors)
    grad_scale, grad_shift, grad_gate = (part.to(dtype) for part, dtype in zip(sums[:, :3].split(1, 1), ctx.dtypes))
    bias = ctx.saved_tensors[2]
    grad_bias = None if bias is None else sums[:, 3].sum(dim=0).to(bias.dtype)
    return grad_stream, grad_branch, grad_bias, grad_gate, grad_scale, grad_shift, None


_norm.register_autograd(_differentiate_norm, setup_context=_keep_norm)
_gated_norm.register_autograd(differentiate_gated_norm, setup_context=keep_gated_norm)
