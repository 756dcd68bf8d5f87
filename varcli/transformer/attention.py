"""Multi-head attention over one's own step and all earlier ones, with or without a cache."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varcli.kernels import is_launched
from varcli.kernels.attention import attend, attend_step, is_served
from varcli.kernels.fp8 import Rounded, fp8_product, round_rows
from varcli.kernels.fp8_rows import Rows, plain_rows, rows_product, to_rows
from varcli.kernels.qk import normalize_into, normalized_steps
from varcli.transformer.base import TransformerConfig

_MAX_LOG_SCALE = math.log(100)  # temperatures are capped at 100, as in Swin v2 (arXiv:2111.09883)


@dataclass
class LayerCache:
    """Keys and values of one block, room for all L tokens: (B, n, L, d) each."""

    keys: Tensor
    values: Tensor

    def place(self, start: int, length: int) -> tuple[Tensor, Tensor]:
        """Where keys and values of the tokens from position `start` on belong: two views (B, n, l, d)."""
        return self.keys[:, :, start : start + length], self.values[:, :, start : start + length]

    def until(self, end: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the first `end` tokens: two views (B, n, end, d)."""
        return self.keys[:, :, :end], self.values[:, :, :end]


def keep_in_cache(
    q_Bnld: Tensor, k_Bnld: Tensor, v_Bnld: Tensor, key_place_Bnld: Tensor, value_place_Bnld: Tensor
) -> Tensor:
    """Write a step's keys and values to the places a cache has for them; return its queries."""
    key_place_Bnld.copy_(k_Bnld)
    value_place_Bnld.copy_(v_Bnld)
    return q_Bnld


class BlockLinear(nn.Linear):
    """One of the four large linear layers of a block.

    With `fp8` its products are taken in FP8 while it trains, with `prefetches` those of few rows by `few_rows_triton`.
    """

    fp8 = False
    prefetches = False

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__(in_features, out_features, bias)
        self.register_buffer("scales_N1", None, persistent=False)  # of the weight's rows, once they are kept in FP8

    def keep_in_fp8(self, device: torch.device | None = None) -> None:
        """Round the weight's rows to FP8 on `device` and keep them alone, a byte a weight; the bias becomes bfloat16.

        From then on products are taken in FP8, in eval mode too, and nothing has gradients.
        """
        rows_NK, self.scales_N1 = round_rows(self.weight.detach().to(device))
        self.weight = nn.Parameter(rows_NK, requires_grad=False)
        if self.bias is not None:
            self.bias = nn.Parameter(self.bias.detach().to(device, torch.bfloat16), requires_grad=False)
        self.prefetches = False

    def __getstate__(self) -> dict[str, Any]:
        """What a copy is made of: it may come to a device that launches no kernel early."""
        return super().__getstate__() | {"prefetches": False}


def linear(layer: nn.Linear, x: Tensor | Rows, bias: Tensor | None = None) -> Tensor:
    """Apply a linear layer in the precision of its weights, or in autocast's if that is on. bias: in place of its own.

    x: see `product`.
    """
    bias = layer.bias if bias is None else bias
    if is_kept_in_fp8(layer):
        x = x if isinstance(x, Rows) else plain_rows(x)
    elif not is_in_fp8(layer):
        return F.linear(_like_weight(x, layer), layer.weight, None if bias is None else bias.to(layer.weight.dtype))
    y = product(layer, x)
    return y if bias is None else y + bias.to(y.dtype)


def product(layer: nn.Linear, x: Tensor | Rounded | Rows) -> Tensor:
    """Apply a linear layer as `linear` does, without its bias.

    x: `Rounded` only where `is_in_fp8` is true of the layer, `Rows` only where `is_kept_in_fp8` is.
    """
    if is_kept_in_fp8(layer):
        return rows_product(x if isinstance(x, Rows) else to_rows(x), layer.weight, layer.scales_N1)
    if is_in_fp8(layer):
        return fp8_product(x, layer.weight)
    if is_prefetched(layer, x):
        return few_rows_product(x, layer.weight)
    return F.linear(_like_weight(x, layer), layer.weight)


def few_rows_product(x: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """Return x W^T, or with a bias the GELU of its sum with that, where `is_prefetched` is true."""
    from varcli.kernels.few_rows_triton import launch_product

    y_MN = launch_product(x.flatten(0, -2).to(weight_NK.dtype), weight_NK, bias_N, is_early=True)
    return y_MN.unflatten(0, x.shape[:-1])


def _like_weight(x: Tensor, layer: nn.Linear) -> Tensor:
    """Bring what a layer reads to its weight's dtype, unless autocast does: autograd would keep both."""
    return x if torch.is_autocast_enabled(x.device.type) else x.to(layer.weight.dtype)


def is_in_fp8(layer: nn.Linear) -> bool:
    """Whether a layer that trains has its products taken in FP8 now."""
    return isinstance(layer, BlockLinear) and layer.fp8 and layer.training


def is_prefetched(layer: nn.Linear, x: Tensor) -> bool:
    """Whether a layer's product of `x` is one of few rows, whose weights are under way before `x` is there."""
    if not (isinstance(layer, BlockLinear) and layer.prefetches and is_launched(x)):
        return False
    if layer.weight.dtype == torch.float32:
        return False
    from varcli.kernels.few_rows_triton import MOST_ROWS

    return x.shape[:-1].numel() <= MOST_ROWS


def is_kept_in_fp8(layer: nn.Linear) -> bool:
    """Whether a layer's weight is kept in FP8 alone."""
    return isinstance(layer, BlockLinear) and layer.scales_N1 is not None


def unit_length(x: Tensor, length: Tensor | float = 1.0) -> Tensor:
    """Scale the last dimension to `length`, in float32; a vector shorter than 1e-12 ends up shorter than that."""
    x = x.float()
    # one factor a vector, so that x itself is read and written once
    return x * (length / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(1e-12))


def attend_by_step(
    q_Bnld: Tensor, k_BnLd: Tensor, v_BnLd: Tensor, step_lengths: tuple[int, ...], scale: float
) -> Tensor:
    """Let the queries of each step see the keys of their own step and of all earlier ones; returns (B, l, n * d).

    The queries, (B, n, l, d), are the last l of the L tokens whose keys and values, (B, n, L, d), are given; step_lengths
    add up to l. One attention without a mask for each step, over a prefix of the keys: the fast
    kernels take no mask, and what a mask hides is not computed.
    """
    assert sum(step_lengths) == q_Bnld.shape[2], (step_lengths, q_Bnld.shape)
    before = k_BnLd.shape[2] - q_Bnld.shape[2]
    steps, start = [], 0
    for length in step_lengths:
        end = start + length
        steps.append((q_Bnld[:, :, start:end], k_BnLd[:, :, : before + end], v_BnLd[:, :, : before + end]))
        start = end
    return _attend(steps, scale)


def _attend(steps: list[tuple[Tensor, Tensor, Tensor]], scale: float) -> Tensor:
    pieces = [F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2) for q, k, v in steps]
    return (pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)).flatten(2)


class SelfAttention(nn.Module):
    """What attention of (B, l, C) learns: `project` comes before `attend_by_step`, `join` after it. Keys have no bias."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = BlockLinear(config.width, 3 * config.width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(config.width))
        self.v_bias = nn.Parameter(torch.zeros(config.width))
        self.register_parameter("log_scale", None)
        self.softmax_scale = 0.25 / math.sqrt(config.head_width)  # a quarter of the usual, as released
        if config.qk_norm:
            self.log_scale = nn.Parameter(torch.full((1, config.num_heads, 1, 1), math.log(4.0)))
            self.softmax_scale = 1.0
        self.proj = BlockLinear(config.width, config.width)
        self.dropout = nn.Dropout(config.dropout)

    def project(self, x_BlC: Tensor | Rows) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values, (B, n, l, d) each. x: see `product`."""
        bias = torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias))
        qkv = linear(self.qkv, x_BlC, bias)
        q, k, v = qkv.unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        if self.log_scale is not None:
            # the cap has no gradient above it: a head that reaches it stays there unless decay moves it
            q = unit_length(q, self.log_scale.float().clamp_max(_MAX_LOG_SCALE).exp()).to(v.dtype)
            k = unit_length(k).to(v.dtype)
        return q, k, v

    def attend_steps(self, x_BLC: Tensor | Rounded | Rows, step_lengths: tuple[int, ...]) -> Tensor:
        """`project`, then `attend_by_step`, for all L tokens, with what stands between the products in `varcli.kernels`."""
        if self.log_scale is None:
            x_BLC = x_BLC.whole if isinstance(x_BLC, Rounded) else x_BLC
            return attend_by_step(*self.project(x_BLC), step_lengths, self.softmax_scale)
        qkv, learned = product(self.qkv, x_BLC), (self.q_bias, self.v_bias, self.log_scale)
        if self._is_served(qkv):
            return attend(qkv, *learned, _MAX_LOG_SCALE, step_lengths, self.softmax_scale)
        return _attend(normalized_steps(qkv, *learned, _MAX_LOG_SCALE, step_lengths), self.softmax_scale)

    def attend_cached(self, x_BlC: Tensor | Rows, cache: LayerCache, start: int) -> Tensor:
        """`attend_steps` for the tokens of one step, from position `start` on, whose keys and values join the cache."""
        if self.log_scale is None:
            q, k, v = self.project(x_BlC)
            length = q.shape[2]
            q = keep_in_cache(q, k, v, *cache.place(start, length))
        else:
            qkv, learned = product(self.qkv, x_BlC), (self.q_bias, self.v_bias, self.log_scale)
            length = qkv.shape[1]
            if self._is_served(qkv):
                scales = _MAX_LOG_SCALE, *cache.until(start + length), self.softmax_scale
                return attend_step(qkv, *learned, *scales, is_early=is_prefetched(self.qkv, qkv))
            q = normalize_into(qkv, *learned, _MAX_LOG_SCALE, *cache.place(start, length))
        return attend_by_step(q, *cache.until(start + length), (length,), self.softmax_scale)

    def _is_served(self, qkv_BlC: Tensor) -> bool:
        """Whether attention is to come after this product in one kernel."""
        return is_served(qkv_BlC.dtype, qkv_BlC.shape[2] // (3 * self.num_heads))

    def join(self, y_BlC: Tensor) -> Tensor:
        """Mix what the heads saw."""
        return self.dropout(linear(self.proj, y_BlC))
