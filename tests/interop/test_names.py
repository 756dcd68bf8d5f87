"""Names of the released code: spelled out for one layer of each kind, and one to one."""

from __future__ import annotations

import pytest
import torch

from varcli.interop.names import quantizer_names, tokenizer_names, transformer_buffers, transformer_names
from varcli.tokenizer import VQVAE, TokenizerConfig
from varcli.transformer import Transformer, TransformerConfig


def test_the_released_tokenizer_has_its_324_tensors():
    with torch.device("meta"):
        state = VQVAE(TokenizerConfig()).state_dict()
    names = tokenizer_names(state, num_phis=4)
    assert len(set(names.values())) == 324
    for ours, theirs in {
        "encoder.levels.2.blocks.0.shortcut.weight": "encoder.down.2.block.0.nin_shortcut.weight",
        "encoder.levels.0.resample.conv.bias": "encoder.down.0.downsample.conv.bias",
        "encoder.levels.4.attentions.1.qkv.weight": "encoder.down.4.attn.1.qkv.weight",
        "decoder.levels.1.resample.conv.weight": "decoder.up.1.upsample.conv.weight",
        "decoder.middle.attention.proj_out.weight": "decoder.mid.attn_1.proj_out.weight",
        "decoder.middle.block_2.norm1.bias": "decoder.mid.block_2.norm1.bias",
        "pre_conv.weight": "quant_conv.weight",
        "post_conv.bias": "post_quant_conv.bias",
        "quantizer.codebook.weight": "quantize.embedding.weight",
        "quantizer.phis.3.weight": "quantize.quant_resi.qresi_ls.3.weight",
        "quantizer.usage_KV": "quantize.ema_vocab_hit_SV",
    }.items():
        assert names[ours] == theirs


@pytest.mark.parametrize(("num_phis", "expected"), [(1, "qresi.weight"), (0, "0.weight"), (2, "qresi_ls.0.weight")])
def test_phis_are_named_by_how_they_are_shared(num_phis, expected):
    assert quantizer_names(["phis.0.weight"], num_phis) == {"phis.0.weight": f"quantize.quant_resi.{expected}"}


@pytest.mark.parametrize(("shared", "depth", "total", "parameters"), [(False, 16, 220, 202), (True, 36, 446, 408)])
def test_the_released_transformers_have_their_tensors(shared, depth, total, parameters):
    with torch.device("meta"):
        model = Transformer(TransformerConfig(depth=depth, width=64, num_heads=1, shared_adaln=shared))
    names = transformer_names(model.state_dict())
    assert len(set(names.values())) == parameters
    assert len(set(names.values()) | set(transformer_buffers(model.config))) == total


def test_the_mask_hides_later_scales_only():
    buffers = transformer_buffers(TransformerConfig(width=8, num_heads=1, depth=1, step_lengths=(1, 4)))
    assert buffers["lvl_1L"].tolist() == [[0, 1, 1, 1, 1]]
    assert buffers["attn_bias_for_masking"].isinf().tolist() == [[[[False] + [True] * 4] + [[False] * 5] * 4]]
    assert not buffers["blocks.0.attn.zero_k_bias"].any()
