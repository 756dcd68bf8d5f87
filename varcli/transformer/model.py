"""The transformer of VAR: class and earlier steps in, logits of every code out.

With teacher forcing all steps run at once, each seeing itself and the earlier ones; while sampling they run one by one
with a key/value cache. Both give the same logits. Source: VAR, arXiv:2404.02905, and its released weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varcli.errors import unknown_name
from varcli.kernels import KERNELS, is_launched, launches_early
from varcli.kernels.cross_entropy import linear_cross_entropy
from varcli.shapes import check_shape
from varcli.transformer.attention import BlockLinear, LayerCache, attend_by_step, is_kept_in_fp8, linear
from varcli.transformer.base import TransformerConfig
from varcli.transformer.blocks import COMPILED, Block, Condition, Stream, cached_queries, modulated_norm

_EMBEDDED_AT_ONCE = 256  # code channels that a program of the kernel holds
_UNDECAYED = ("start_position", "positions", "step_embedding", "log_scale", "modulation_offset")


@dataclass
class KVCache:
    """The state of step-by-step inference: keys and values of every block, and what depends on the class alone."""

    layers: list[LayerCache]
    condition_BC: Tensor  # class embedding, float32
    modulations: list[Tensor]  # (B, 1, 6, C) a block, computed once for all steps
    head_modulation: tuple[Tensor, Tensor]  # scale and shift (B, 1, C) of the last norm
    positions_1LC: Tensor  # what a token's place adds, float32
    step: int = 0  # steps done
    position: int = 0  # tokens done

    def first(self, batch: int) -> KVCache:
        """The same state of the first `batch` samples alone, sharing their memory."""
        return replace(
            self,
            layers=[LayerCache(layer.keys[:batch], layer.values[:batch]) for layer in self.layers],
            condition_BC=self.condition_BC[:batch],
            modulations=[modulation[:batch] for modulation in self.modulations],
            head_modulation=tuple(part[:batch] for part in self.head_modulation),
        )


class Transformer(nn.Module):
    """Logits over V codes for each of L tokens, predicted in steps of `config.step_lengths` tokens.

    A token sees its own step and all earlier ones. What it reads is a feature vector of Z channels that an order
    prepared from the codes of earlier steps; the tokens of the first step read the class instead.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.class_embedding = nn.Embedding(config.num_classes + 1, width)  # the last row stands for no class
        self.start_position = nn.Parameter(torch.empty(1, config.step_lengths[0], width))
        self.positions = nn.Parameter(torch.empty(1, config.seq_len, width))
        self.step_embedding = nn.Embedding(config.num_steps, width)
        self.input_projection = nn.Linear(config.code_channels, width)
        self.shared_modulation = nn.Linear(width, 6 * width) if config.shared_adaln else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.head_modulation = nn.Linear(width, 2 * width)
        self.output_projection = nn.Linear(width, config.vocab_size)
        steps = [step for step, length in enumerate(config.step_lengths) for _ in range(length)]
        # on a real device even if the weights are not, so that weights can be put in place later
        self.register_buffer("step_of_token_L", torch.tensor(steps, device="cpu"), persistent=False)
        self._before_attention, self._after_attention = cached_queries, Block.after_attention
        self.kernels = "torch"
        self.init_weights()

    @property
    def num_parameters(self) -> int:
        """Count of all weights."""
        return sum(parameter.numel() for parameter in self.parameters())

    @property
    def kernels(self) -> str:
        """One of `varcli.kernels.KERNELS`: "torch", or "triton" for the fewer passes of `varcli.kernels`."""
        return self._kernels

    @kernels.setter
    def kernels(self, name: str) -> None:
        """Take one of `varcli.kernels.KERNELS`. Raises ConfigError for another."""
        if name not in KERNELS:
            raise unknown_name("kernels", name, KERNELS)
        self._kernels = name

    # -- teacher forcing -----------------------------------------------------------------------------------------

    def forward(self, labels_B: Tensor, x_BLZ: Tensor, branches: Tensor | None = None) -> Tensor:
        """Return the logits (B, L, V), float32, of every code given the true earlier ones.

        labels_B: class indices; `config.num_classes` stands for no class.
        x_BLZ: what the order made of the true codes, (B, L - l_0, Z); position i is aligned with the code predicted there.
        branches: factors on the residual branches, (depth, 2, B), that `drop_branches` drew; None keeps all as they are.
        Raises ShapeError if x has another shape.
        """
        return self.head(self.hidden(labels_B, x_BLZ, branches))

    def hidden(self, labels_B: Tensor, x_BLZ: Tensor, branches: Tensor | None = None) -> Tensor:
        """Return what `head` turns into logits (B, L, C): float32, or in the precision of products with Triton."""
        x, condition, head_modulation = self._enter(labels_B, x_BLZ)
        return self._last_norm(self._run_blocks(x, condition, branches), *head_modulation)

    def _enter(self, labels_B: Tensor, x_BLZ: Tensor) -> tuple[Tensor | Stream, Condition, tuple[Tensor, Tensor]]:
        """Return what the first block reads, and what the class decides."""
        config = self.config
        check_shape("x", x_BLZ, (labels_B.shape[0], config.seq_len - config.step_lengths[0], config.code_channels))
        condition_BC = self.embed_labels(labels_B)
        first = condition_BC.unsqueeze(1) + self.start_position.float()
        x = torch.cat((first, self._project(x_BLZ)), dim=1) + self._embed_positions()
        x = x.to(self._compute_dtype())
        return x if self.kernels == "torch" else Stream(x), *self._modulate(condition_BC)

    def _run_blocks(self, x: Tensor | Stream, condition: Condition, branches: Tensor | None) -> Tensor | Stream:
        by_block = [None] * self.config.depth if branches is None else branches.unbind()
        for block, branches_2B in zip(self.blocks, by_block, strict=True):
            x = block(x, condition, self.config.step_lengths, branches_2B=branches_2B)
        return x

    def _last_norm(self, x: Tensor | Stream, scale_B1C: Tensor, shift_B1C: Tensor) -> Tensor:
        if isinstance(x, Stream):
            return x.enter(scale_B1C, shift_B1C, self.config.norm_eps)[1]
        return modulated_norm(x, scale_B1C, shift_B1C, self.config.norm_eps)

    def head(self, h_BlC: Tensor) -> Tensor:
        """Return the logits (B, l, V), float32, of what `hidden` gave."""
        return linear(self.output_projection, h_BlC).float()

    def losses(
        self,
        labels_B: Tensor,
        x_BLZ: Tensor,
        codes_BL: Tensor,
        label_smoothing: float = 0.0,
        branches: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the mean cross entropy to learn from, each token's without smoothing (B, L), and where the logits hit it.

        labels_B, x_BLZ, branches: see `forward`. The last two results have no gradient.
        """
        x, condition, head_modulation = self._enter(labels_B, x_BLZ)
        x = self._run_blocks(x, condition, branches)
        return self._losses_of(x, head_modulation, codes_BL, label_smoothing)

    def _losses_of(
        self,
        x: Tensor | Stream,
        head_modulation: tuple[Tensor, Tensor],
        codes_BL: Tensor,
        label_smoothing: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        h_BLC, targets = self._last_norm(x, *head_modulation), codes_BL.flatten()
        if self.kernels != "torch":
            layer = self.output_projection
            loss, losses_N, hits_N = linear_cross_entropy(
                h_BLC.flatten(0, 1), layer.weight, layer.bias, targets, label_smoothing, self._compute_dtype()
            )
            return loss, losses_N.view(codes_BL.shape), hits_N.view(codes_BL.shape)
        logits_BLV = self.head(h_BLC)
        flat = logits_BLV.flatten(0, 1)
        losses_BL = F.cross_entropy(flat, targets, reduction="none").view(codes_BL.shape)
        loss = F.cross_entropy(flat, targets, label_smoothing=label_smoothing) if label_smoothing else losses_BL.mean()
        return loss, losses_BL.detach(), logits_BLV.detach().argmax(dim=-1) == codes_BL

    def compile_parts(self, backend: str = "inductor") -> None:
        """Let torch.compile fuse a block, what comes before all blocks, and what comes after them, each alone.

        One block is compiled for all of them: the first step of depth 16 comes after half a minute, as that of depth 30.
        backend: of torch.compile.
        """
        for block in self.blocks:
            block.forward = torch.compile(block.forward, dynamic=False, backend=backend)
        for name in ("_enter", "_losses_of"):
            setattr(self, name, torch.compile(getattr(self, name), dynamic=False, backend=backend))

    def uncompile_parts(self) -> None:
        """Take back what `compile_parts` did."""
        for part in (self, *self.blocks):
            for name in COMPILED:
                vars(part).pop(name, None)

    @property
    def has_compiled_parts(self) -> bool:
        """Whether `compile_parts` was called, and not taken back."""
        return "_enter" in vars(self)

    def __getstate__(self) -> dict[str, Any]:
        """What a copy is made of: it begins uncompiled, as what is compiled belongs to this model's weights."""
        return {name: value for name, value in super().__getstate__().items() if name not in COMPILED}

    # -- step by step --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def start_cache(self, labels_B: Tensor) -> KVCache:
        """Prepare step-by-step inference for a batch of classes; `config.num_classes` stands for no class."""
        condition_BC = self.embed_labels(labels_B)
        condition, head_modulation = self._modulate(condition_BC)
        activated_BC = condition.activated_BC.to(self._compute_dtype())  # once for all blocks
        rounded = condition._replace(activated_BC=activated_BC)
        modulations = [block.modulate(rounded) for block in self.blocks]
        positions_1LC = self._embed_positions()
        return KVCache(self._empty_layers(len(labels_B)), condition_BC, modulations, head_modulation, positions_1LC)

    def _empty_layers(self, batch: int) -> list[LayerCache]:
        """Return each block's room for keys and values.

        Those of the last step are read once, by their own block. They take the place of what the block before has stored,
        which nobody reads any more then: so there is room for them in one block alone, a third of all at 256 px.
        """
        config = self.config
        earlier = config.seq_len - config.step_lengths[-1]
        room = (batch, config.num_heads, config.depth * earlier + config.step_lengths[-1], config.head_width)
        keys, values = (torch.empty(room, dtype=self._compute_dtype(), device=self.positions.device) for _ in range(2))
        starts = [earlier * (config.depth - 1 - index) for index in range(config.depth)]
        return [
            LayerCache(keys.narrow(2, start, config.seq_len), values.narrow(2, start, config.seq_len))
            for start in starts
        ]

    def compile_steps(self, backend: str = "inductor") -> None:
        """Let torch.compile fuse what blocks do before and after attention, step by step.

        One block is compiled for all, for steps of one token and for longer ones. backend: of torch.compile.
        """
        self._before_attention = torch.compile(cached_queries, backend=backend)
        self._after_attention = torch.compile(Block.after_attention, backend=backend)

    def prefetch_weights(self) -> None:
        """Let blocks load the weights of a step of few tokens before what they multiply is there, if their GPU can.

        With kernels `triton` and weights in half precision, as they are now; for many images, as it takes seconds to compile.
        """
        weight = self.output_projection.weight
        can = self.kernels == "triton" and weight.dtype != torch.float32 and launches_early(weight.device)
        for layer in self.blocks.modules():
            if isinstance(layer, BlockLinear):
                layer.prefetches = can and layer.weight.is_contiguous() and not is_kept_in_fp8(layer)

    @torch.no_grad()
    def step(self, x_BlZ: Tensor | None, cache: KVCache) -> Tensor:
        """Return the logits (B, l, V) of the next step, in the precision of products, and advance `cache` past it.

        x_BlZ: what the order made of the codes so far, of as many samples as the cache has, or of the first of them, which
        the others repeat; None at the first step, which reads the class alone.
        """
        length = self.config.step_lengths[cache.step]
        start, end = cache.position, cache.position + length
        positions = cache.positions_1LC[:, start:end]
        if cache.step == 0:
            x = (cache.condition_BC.unsqueeze(1) + self.start_position.float() + positions).to(self._compute_dtype())
        else:
            x = self._embed(x_BlZ, positions, len(cache.condition_BC))
        x = x if self.kernels == "torch" else Stream(x)
        for block, modulation, layer in zip(self.blocks, cache.modulations, cache.layers, strict=True):
            if isinstance(x, Stream):
                x = block.step(x, modulation, layer, start)
                continue
            q = self._before_attention(block, x, modulation, *layer.place(start, length))
            seen = attend_by_step(q, *layer.until(end), (length,), block.attention.softmax_scale)
            x = self._after_attention(block, x, seen, modulation)
        cache.step, cache.position = cache.step + 1, end
        return linear(self.output_projection, self._last_norm(x, *cache.head_modulation))

    # -- parts of both -------------------------------------------------------------------------------------------

    def embed_labels(self, labels_B: Tensor) -> Tensor:
        """Return the class condition (B, C), float32."""
        return self.class_embedding(labels_B).float()

    def _embed(self, x_BlZ: Tensor, positions_1lC: Tensor, batch: int) -> Tensor:
        """Return what the first block reads of a step, (batch, l, C)."""
        config, layer = self.config, self.input_projection
        copies, rest = divmod(batch, max(1, len(x_BlZ)))
        samples = batch if rest or not copies else batch // copies
        check_shape("x", x_BlZ, (samples, positions_1lC.shape[1], config.code_channels))
        if self.kernels == "triton" and is_launched(x_BlZ) and config.code_channels <= _EMBEDDED_AT_ONCE:
            from varcli.kernels.small_maps_triton import launch_embed

            weights = layer.weight.float(), layer.bias.float()
            return launch_embed(x_BlZ.float(), *weights, positions_1lC, copies, self._compute_dtype())
        return (self._project(x_BlZ.repeat(copies, 1, 1)) + positions_1lC).to(self._compute_dtype())

    def _project(self, x_BlZ: Tensor) -> Tensor:
        # sums of embeddings stay float32 whatever autocast says: features differ in their last digits
        with torch.autocast(x_BlZ.device.type, enabled=False):
            layer = self.input_projection
            return F.linear(x_BlZ.float(), layer.weight.float(), layer.bias.float())

    def _embed_positions(self) -> Tensor:
        return self.step_embedding(self.step_of_token_L).float() + self.positions.float()

    def _modulate(self, condition_BC: Tensor) -> tuple[Condition, tuple[Tensor, Tensor]]:
        """Return what the class decides: what blocks make their modulation of, and scale and shift of the last norm."""
        activated = F.silu(condition_BC)
        shared = None
        if self.shared_modulation is not None:
            shared = linear(self.shared_modulation, activated).view(activated.shape[0], 1, 6, -1)
        scale, shift = linear(self.head_modulation, activated).unsqueeze(1).chunk(2, dim=-1)
        return Condition(activated, shared), (scale, shift)

    def _compute_dtype(self) -> torch.dtype:
        weight = self.output_projection.weight
        if torch.is_autocast_enabled(weight.device.type):
            return torch.get_autocast_dtype(weight.device.type)
        return weight.dtype

    # -- weights -------------------------------------------------------------------------------------------------

    def keep_products_in(self, dtype: torch.dtype, device: torch.device | None = None) -> None:
        """Keep the weights of matrix products in half precision: what autocast computes, without its copies.

        They are rounded on `device`, layer by layer, and stay there; None is where they are. The input projection,
        embeddings, temperatures and the biases of queries and values are float32 from then on. What `keep_in_fp8` has
        rounded stays so.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear) and module is not self.input_projection:
                if not is_kept_in_fp8(module):
                    module.to(device).to(dtype)
            else:
                for parameter in module.parameters(recurse=False):  # copies: views would keep alive all that was read
                    parameter.data = parameter.data.to(torch.float32, copy=True)

    def keep_in_fp8(self, device: torch.device | None = None) -> None:
        """Keep the weights of each block's four large products in FP8 alone, for products in FP8; the rest as for bfloat16.

        The weights are rounded on `device` and stay there. For sampling: nothing of it has gradients.
        """
        for module in self.modules():
            if isinstance(module, BlockLinear):
                module.keep_in_fp8(device)
        self.keep_products_in(torch.bfloat16, device)

    @property
    def is_kept_in_fp8(self) -> bool:
        """Whether `keep_in_fp8` was called."""
        return is_kept_in_fp8(self.blocks[0].attention.qkv)

    def train_in_fp8(self) -> None:
        """Take the four large products of each block in FP8 while training (`varcli.kernels.fp8`); eval mode does not."""
        for module in self.modules():
            if isinstance(module, BlockLinear):
                module.fp8 = True

    def undecayed_parameters(self) -> set[str]:
        """Names of the parameters that weight decay leaves alone: biases, positions, steps, temperatures, offsets."""
        return {
            name
            for name, parameter in self.named_parameters()
            if parameter.ndim == 1 or name.endswith("bias") or any(part in name for part in _UNDECAYED)
        }

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Draw every weight anew, as the paper's models start.

        Embeddings and linear weights are normal with std sqrt(1 / (3C)); head, modulation and the layers that write
        into the residual stream then start smaller.
        """
        config = self.config
        std = config.init_std if config.init_std is not None else math.sqrt(1 / (3 * config.width))
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.trunc_normal_(module.weight, std=std, generator=generator)
            if isinstance(module, nn.Linear) and module.bias is not None:
                module.bias.zero_()
        nn.init.trunc_normal_(self.start_position, std=std, generator=generator)
        nn.init.trunc_normal_(self.positions, std=std, generator=generator)
        self.output_projection.weight.mul_(config.init_head)
        self.head_modulation.weight.mul_(config.init_adaln)
        for block in self.blocks:
            block.attention.q_bias.zero_()
            block.attention.v_bias.zero_()
            if block.attention.log_scale is not None:
                block.attention.log_scale.fill_(math.log(4.0))
            for layer in (block.attention.proj, block.feed_forward.fc2):
                layer.weight.div_(math.sqrt(2 * config.depth))
            if block.modulation_offset is not None:
                modulation = block.modulation_offset.normal_(generator=generator).div_(math.sqrt(config.width))
                gates, others = modulation[:, :, :2], modulation[:, :, 2:]
            else:
                gates, others = block.modulation.weight.split((2 * config.width, 4 * config.width))
            gates.mul_(config.init_adaln_gamma)
            others.mul_(config.init_adaln)
