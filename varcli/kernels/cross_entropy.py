"""A linear head and its cross entropy, some rows at a time: the logits of a whole batch are never in memory.

The gradient of a row's logits is known as soon as its loss is, so each piece's gradients are taken in the forward pass
and nothing is computed twice. Plain torch on every device; torch.compile fuses what stands between the products.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_ROWS = 8192  # at a time: enough for products at full rate, 64 MiB of logits of 4096 codes in half precision


def linear_cross_entropy_reference(
    h_NC: Tensor, weight_VC: Tensor, bias_V: Tensor, targets_N: Tensor, label_smoothing: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """`linear_cross_entropy` with all logits at once, in the dtype of its arguments."""
    logits_NV = F.linear(h_NC, weight_VC, bias_V)
    losses_N = F.cross_entropy(logits_NV, targets_N, reduction="none")
    loss = F.cross_entropy(logits_NV, targets_N, label_smoothing=label_smoothing)
    return loss, losses_N.detach(), logits_NV.argmax(dim=-1) == targets_N


def linear_cross_entropy(
    h_NC: Tensor,
    weight_VC: Tensor,
    bias_V: Tensor,
    targets_N: Tensor,
    label_smoothing: float = 0.0,
    dtype: torch.dtype | None = None,
    rows: int = _ROWS,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the mean loss to learn from, and of each row its loss without smoothing (N,) and whether it was hit (N,).

    dtype: of the products; None is the weight's. Everything between them, and the losses, are float32 or wider.
    rows: at most so many are worked on at once. Only the first result has a gradient.
    """
    return _LinearCrossEntropy.apply(
        h_NC, weight_VC, bias_V, targets_N, label_smoothing, dtype or weight_VC.dtype, rows
    )


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h_NC, weight_VC, bias_V, targets_N, label_smoothing, dtype, rows):
        wide = torch.promote_types(dtype, torch.float32)
        count, num_codes = len(h_NC), len(weight_VC)
        even = -(-count // -(-count // rows))  # pieces of one size, so that torch.compile meets few shapes
        with torch.autocast(h_NC.device.type, enabled=False):
            weight, bias = weight_VC.to(dtype), bias_V.to(dtype)
            grad_weight, grad_bias = torch.zeros_like(weight, dtype=wide), torch.zeros_like(bias, dtype=wide)
            losses, smooth, hits, grads_h = [], [], [], []
            for piece, targets in zip(h_NC.split(even), targets_N.split(even), strict=True):
                piece = piece.to(dtype)
                logits = F.linear(piece, weight, bias).to(wide)
                log_total = logits.logsumexp(dim=1)
                losses.append(log_total - logits.gather(1, targets[:, None])[:, 0])
                smooth.append(log_total - logits.mean(dim=1))
                hits.append(logits.argmax(dim=1) == targets)
                is_target = targets[:, None] == torch.arange(num_codes, device=targets.device)
                expected = is_target.to(wide) * (1 - label_smoothing) + label_smoothing / num_codes
                # not yet divided by the number of rows: float16 would lose what is left of it
                grad = ((logits - log_total[:, None]).exp() - expected).to(dtype)
                grads_h.append(grad @ weight)
                grad_weight += (grad.T @ piece).to(wide)
                grad_bias += grad.sum(dim=0, dtype=wide)
            losses_N = torch.cat(losses)
            loss = losses_N.mean()
            if label_smoothing:
                loss = (1 - label_smoothing) * loss + label_smoothing * torch.cat(smooth).mean()
            hits_N = torch.cat(hits)
        ctx.save_for_backward(torch.cat(grads_h), grad_weight, grad_bias)
        ctx.dtypes = h_NC.dtype, weight_VC.dtype, bias_V.dtype
        ctx.mark_non_differentiable(losses_N, hits_N)
        return loss, losses_N, hits_N

    @staticmethod
    def backward(ctx, grad_loss, *_):
        grads = ctx.saved_tensors
        share = grad_loss / len(grads[0])
        grad_h, grad_weight, grad_bias = ((grad * share).to(dtype) for grad, dtype in zip(grads, ctx.dtypes))
        return grad_h, grad_weight, grad_bias, None, None, None, None
