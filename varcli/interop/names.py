"""Which tensor of ours is which tensor of the released VAR code, and which of theirs can be computed.

Source: FoundationVision/VAR, commit 78b95394fc5896192e3a003e4b295f8ea743c48f. Renames only: no tensor is reshaped.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

import torch
from torch import Tensor

from varcli.transformer import TransformerConfig

_TOKENIZER_RENAMES = (
    (r"^encoder\.levels\.(\d+)\.resample\.", r"encoder.down.\1.downsample."),
    (r"^decoder\.levels\.(\d+)\.resample\.", r"decoder.up.\1.upsample."),
    (r"^encoder\.levels\.", "encoder.down."),
    (r"^decoder\.levels\.", "decoder.up."),
    (r"\.blocks\.(\d+)\.", r".block.\1."),
    (r"\.attentions\.(\d+)\.", r".attn.\1."),
    (r"\.shortcut\.", ".nin_shortcut."),
    (r"\.middle\.attention\.", ".mid.attn_1."),
    (r"\.middle\.", ".mid."),
    (r"^pre_conv\.", "quant_conv."),
    (r"^post_conv\.", "post_quant_conv."),
)
_QUANTIZER_RENAMES = {"codebook.weight": "embedding.weight", "usage_KV": "ema_vocab_hit_SV"}
_TRANSFORMER_RENAMES = (
    (r"^start_position$", "pos_start"),
    (r"^positions$", "pos_1LC"),
    (r"^step_embedding\.", "lvl_embed."),
    (r"^class_embedding\.", "class_emb."),
    (r"^input_projection\.", "word_embed."),
    (r"^shared_modulation\.", "shared_ada_lin.1."),
    (r"^head_modulation\.", "head_nm.ada_lin.1."),
    (r"^output_projection\.", "head."),
    (r"\.modulation_offset$", ".ada_gss"),
    (r"\.modulation\.", ".ada_lin.1."),
    (r"\.attention\.qkv\.", ".attn.mat_qkv."),
    (r"\.attention\.log_scale$", ".attn.scale_mul_1H11"),
    (r"\.attention\.", ".attn."),
    (r"\.feed_forward\.", ".ffn."),
)


def tokenizer_names(ours: Iterable[str], num_phis: int) -> dict[str, str]:
    """Map names of a VQVAE's state dict to the released code's; `num_phis` as in TokenizerConfig."""
    prefix = "quantizer."
    return {
        name: f"quantize.{_quantizer_name(name.removeprefix(prefix), num_phis)}"
        if name.startswith(prefix)
        else _rename(name, _TOKENIZER_RENAMES)
        for name in ours
    }


def quantizer_names(ours: Iterable[str], num_phis: int) -> dict[str, str]:
    """Map names of a MultiScaleQuantizer's state dict to the released code's, which start with `quantize.`."""
    return {name: f"quantize.{_quantizer_name(name, num_phis)}" for name in ours}


def transformer_names(ours: Iterable[str]) -> dict[str, str]:
    """Map names of a Transformer's state dict to the released code's."""
    return {name: _rename(name, _TRANSFORMER_RENAMES) for name in ours}


def transformer_buffers(config: TransformerConfig) -> dict[str, Tensor]:
    """Return what the released code stores besides weights, and what can be computed: steps, mask, and zero biases."""
    steps = [step for step, length in enumerate(config.step_lengths) for _ in range(length)]
    steps_1L = torch.tensor([steps])
    later_LL = steps_1L.T < steps_1L
    mask = torch.zeros(later_LL.shape).masked_fill(later_LL, -math.inf)
    buffers = {"lvl_1L": steps_1L, "attn_bias_for_masking": mask[None, None]}
    zeros = {f"blocks.{index}.attn.zero_k_bias": torch.zeros(config.width) for index in range(config.depth)}
    return buffers | zeros  # each its own memory: safetensors store no tensor twice


def _quantizer_name(name: str, num_phis: int) -> str:
    if not name.startswith("phis."):
        return _QUANTIZER_RENAMES[name]
    _, index, part = name.split(".")
    if num_phis == 1:
        return f"quant_resi.qresi.{part}"
    return f"quant_resi.{index}.{part}" if num_phis == 0 else f"quant_resi.qresi_ls.{index}.{part}"


def _rename(name: str, renames: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in renames:
        name = re.sub(pattern, replacement, name)
    return name
