"""Transformer blocks whose norms and residual gates come from the class condition (AdaLN)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varcli.kernels.fp8 import Rounded
from varcli.kernels.fp8_gelu import fp8_feed_forward
from varcli.kernels.fp8_norm import rounded_gated_norm
from varcli.kernels.fp8_rows import Rows, gelu_to_rows, norm_to_rows
from varcli.kernels.gelu import linear_gelu
from varcli.kernels.norm import gated_norm, norm
from varcli.transformer.attention import (
    BlockLinear,
    LayerCache,
    SelfAttention,
    attend_by_step,
    few_rows_product,
    is_in_fp8,
    is_kept_in_fp8,
    is_prefetched,
    keep_in_cache,
    linear,
    product,
)
from varcli.transformer.base import TransformerConfig


def modulated_norm(x_BlC: Tensor, scale_B1C: Tensor, shift_B1C: Tensor, eps: float) -> Tensor:
    """Layer norm without weights of its own, then the condition's scale and shift; float32 out."""
    normed = F.layer_norm(x_BlC.float(), (x_BlC.shape[-1],), eps=eps)
    return torch.addcmul(shift_B1C.float(), normed, 1 + scale_B1C.float())


class Condition(NamedTuple):
    """What every block's modulation is made of."""

    activated_BC: Tensor  # the class condition after SiLU
    shared_B16C: Tensor | None = None  # what the shared layer made of it, with `shared_adaln`


class Stream(NamedTuple):
    """A residual stream and a branch that is not yet added to it, since the next norm does so on its way."""

    x_BLC: Tensor
    branch_BLC: Tensor | None = None  # None: nothing is left to add
    bias_C: Tensor | None = None  # of the branch, where it is not in it yet
    gate_B1C: Tensor | None = None

    def enter(
        self, scale_B1C: Tensor, shift_B1C: Tensor, eps: float, reader: nn.Linear | None = None
    ) -> tuple[Tensor, Tensor | Rounded | Rows]:
        """Return the stream with its branch added, and the modulated norm of that.

        reader: the layer that the norm is for; if that is in FP8, the norm comes with its rows, or as these alone where the
        layer's weight is kept in FP8.
        """
        if reader is not None and is_kept_in_fp8(reader):
            return norm_to_rows(*self, scale_B1C, shift_B1C, eps)
        if reader is not None and is_prefetched(reader, self.x_BLC):
            from varcli.kernels.norm_triton import launch_forward

            return launch_forward(*self, scale_B1C, shift_B1C, eps, is_early=True)[:2]
        if self.branch_BLC is None:
            return self.x_BLC, norm(self.x_BLC, scale_B1C, shift_B1C, eps)
        if reader is not None and is_in_fp8(reader) and self.x_BLC.dtype == torch.bfloat16:
            return rounded_gated_norm(*self, scale_B1C, shift_B1C, eps)
        return gated_norm(*self, scale_B1C, shift_B1C, eps)


class FeedForward(nn.Module):
    """Two linear layers with a GELU (tanh form) between them."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.fc1 = BlockLinear(config.width, config.hidden_width)
        self.fc2 = BlockLinear(config.hidden_width, config.width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x_BlC: Tensor) -> Tensor:
        """Apply to every token alone."""
        return self.dropout(linear(self.fc2, F.gelu(linear(self.fc1, x_BlC), approximate="tanh")))


COMPILED = ("forward", "_enter", "_losses_of")
"""Methods in whose place `Transformer.compile_parts` puts compiled ones, each bound to the weights of one model."""


class Block(nn.Module):
    """Attention and feed-forward, each between a modulated norm and a gated residual path.

    The modulation is six vectors a sample, in the order gamma1, gamma2, scale1, scale2, shift1, shift2: from a layer of
    the block's own, or (`shared_adaln`) from one shared layer plus the block's own offset.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.norm_eps = config.norm_eps
        self.attention = SelfAttention(config)
        self.feed_forward = FeedForward(config)
        self.register_parameter("modulation_offset", None)
        if config.shared_adaln:
            self.modulation_offset = nn.Parameter(torch.zeros(1, 1, 6, config.width))
        else:
            self.modulation = nn.Linear(config.width, 6 * config.width)

    def __getstate__(self) -> dict[str, Any]:
        """What a copy is made of; see `Transformer`."""
        return {name: value for name, value in super().__getstate__().items() if name not in COMPILED}

    def modulate(self, condition: Condition) -> Tensor:
        """Return this block's modulation (B, 1, 6, C)."""
        if self.modulation_offset is not None:
            return condition.shared_B16C + self.modulation_offset
        activated_BC = condition.activated_BC
        return linear(self.modulation, activated_BC).view(activated_BC.shape[0], 1, 6, -1)

    def forward(
        self,
        x_BlC: Tensor | Stream,
        modulation: Tensor | Condition,
        step_lengths: tuple[int, ...],
        branches_2B: Tensor | None = None,
    ) -> Tensor | Stream:
        """Return the residual stream after this block, all steps at once.

        x_BlC: the stream before; given as a `Stream` it comes back as one, and the passes of `varcli.kernels` are taken.
        modulation: (B, 1, 6, C) that `modulate` gave, or what it is made of: then this call touches all weights of the
        block and nothing else does, which a block that is sharded over several devices needs.
        step_lengths: tokens of each step, of which each sees itself and all earlier ones.
        branches_2B: factors on the gates of attention and feed-forward, sample by sample; see `drop_branches`.
        """
        modulation_B16C = self.modulate(modulation) if isinstance(modulation, Condition) else modulation
        if isinstance(x_BlC, Stream):
            attend = functools.partial(self.attention.attend_steps, step_lengths=step_lengths)
            x_BlC, branch_BlC, bias_C, gate_B1C = self._forward_stream(x_BlC, modulation_B16C, attend, branches_2B)
            # a sharded block's weights are gone once it returns, and what it returns must not be a part of something else
            return Stream(x_BlC, branch_BlC, None if bias_C is None else bias_C.clone(), gate_B1C.clone())
        q, k, v = self.before_attention(x_BlC, modulation_B16C)
        seen_BlC = attend_by_step(q, k, v, step_lengths, self.attention.softmax_scale)
        return self.after_attention(x_BlC, seen_BlC, modulation_B16C, branches_2B)

    def before_attention(self, x_BlC: Tensor, modulation_B16C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the queries, keys and values (B, n, l, d) of some tokens."""
        _, _, scale1, _, shift1, _ = modulation_B16C.unbind(2)
        return self.attention.project(modulated_norm(x_BlC, scale1, shift1, self.norm_eps))

    def after_attention(
        self, x_BlC: Tensor, seen_BlC: Tensor, modulation_B16C: Tensor, branches_2B: Tensor | None = None
    ) -> Tensor:
        """Return the residual stream after this block, given what attention saw, (B, l, n * d)."""
        gamma1, gamma2, _, scale2, _, shift2 = modulation_B16C.unbind(2)
        gamma1, gamma2 = _gates(gamma1, gamma2, branches_2B)
        x_BlC = torch.addcmul(x_BlC, self.attention.join(seen_BlC), gamma1.to(x_BlC.dtype))
        y = self.feed_forward(modulated_norm(x_BlC, scale2, shift2, self.norm_eps))
        return torch.addcmul(x_BlC, y, gamma2.to(x_BlC.dtype))

    def step(self, stream: Stream, modulation_B16C: Tensor, cache: LayerCache, start: int) -> Stream:
        """Return the stream after this block for the tokens of one step, from position `start` on; no gradients.

        cache: of this block, with the keys and values of all earlier tokens; those of the step are written to it.
        """
        attend = functools.partial(self.attention.attend_cached, cache=cache, start=start)
        return self._forward_stream(stream, modulation_B16C, attend)

    def _forward_stream(
        self,
        stream: Stream,
        modulation_B16C: Tensor,
        attend: Callable[[Tensor | Rounded | Rows], Tensor],
        branches_2B: Tensor | None = None,
    ) -> Stream:
        gamma1, gamma2, scale1, scale2, shift1, shift2 = modulation_B16C.unbind(2)
        gamma1, gamma2 = _gates(gamma1, gamma2, branches_2B)
        x_BlC, normed_BlC = stream.enter(scale1, shift1, self.norm_eps, self.attention.qkv)
        mixed_BlC = product(self.attention.proj, attend(normed_BlC))
        branch = _drop_out(self.attention.dropout, mixed_BlC, self.attention.proj.bias)
        layers = self.feed_forward
        x_BlC, normed_BlC = Stream(x_BlC, *branch, gamma1).enter(scale2, shift2, self.norm_eps, layers.fc1)
        if is_in_fp8(layers.fc1):
            inner = (layers.fc1.weight, layers.fc1.bias)
            y_BlC = fp8_feed_forward(normed_BlC, *inner, layers.fc2.weight)
        elif is_kept_in_fp8(layers.fc1):
            y_BlC = product(layers.fc2, gelu_to_rows(product(layers.fc1, normed_BlC), layers.fc1.bias))
        elif is_prefetched(layers.fc1, normed_BlC):
            y_BlC = product(layers.fc2, few_rows_product(normed_BlC, layers.fc1.weight, layers.fc1.bias))
        else:
            y_BlC = product(layers.fc2, linear_gelu(normed_BlC, layers.fc1.weight, layers.fc1.bias))
        return Stream(x_BlC, *_drop_out(layers.dropout, y_BlC, layers.fc2.bias), gamma2)


def _drop_out(dropout: nn.Dropout, y_BLC: Tensor, bias_C: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return a branch, given without its bias, and that bias, left to whoever adds it unless dropout comes between."""
    if dropout.training and dropout.p > 0:
        return dropout(y_BLC + bias_C.to(y_BLC.dtype)), None
    return y_BLC, bias_C


def _gates(gamma1_B1C: Tensor, gamma2_B1C: Tensor, branches_2B: Tensor | None) -> tuple[Tensor, Tensor]:
    if branches_2B is None:
        return gamma1_B1C, gamma2_B1C
    return gamma1_B1C * branches_2B[0, :, None, None], gamma2_B1C * branches_2B[1, :, None, None]


def cached_queries(block: Block, x_BlC: Tensor, modulation_B16C: Tensor, k_Bnld: Tensor, v_Bnld: Tensor) -> Tensor:
    """Return a step's queries (B, n, l, d) and write its keys and values to where a cache has room for them."""
    return keep_in_cache(*block.before_attention(x_BlC, modulation_B16C), k_Bnld, v_Bnld)
