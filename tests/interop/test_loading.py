"""Released weights into our models: shapes inferred, nothing overlooked, nothing taken that does not fit."""

from __future__ import annotations

import pytest
import torch
from released_names import released_tokenizer_state, released_transformer_state

from varcli.artifacts.write import write_tensors
from varcli.errors import ArtifactError, ConfigError
from varcli.interop.official import load_quantizer, load_tokenizer, load_transformer
from varcli.tokenizer import VQVAE, TokenizerConfig
from varcli.transformer import Transformer, TransformerConfig

TOKENIZER = {"patch_nums": (1, 2, 4), "vocab_size": 16, "code_channels": 8, "width": 32, "num_res_blocks": 1}
TRANSFORMER = {"step_lengths": (1, 4, 16), "vocab_size": 16, "code_channels": 8, "num_classes": 3, "depth": 2}


@pytest.mark.parametrize(
    ("changes", "options"),
    [
        ({}, {}),
        ({"channel_multipliers": (1, 2, 3, 2)}, {}),
        ({"channel_multipliers": (2, 1), "num_res_blocks": 2}, {}),
        ({"width": 64, "code_channels": 5, "quant_conv_kernel": 1}, {}),
        ({"num_phis": 1}, {}),
        ({"num_phis": 0}, {}),
        ({"num_phis": 2, "phi_residual": 0.25}, {"quant_resi": 0.25}),
        ({"phi_residual": 0.0}, {}),
        ({"cosine_codes": True, "commitment_weight": 1.0}, {"using_znorm": True, "beta": 1.0}),
        ({"norm_groups": 8, "dropout": 0.1}, {"norm_groups": 8, "dropout": 0.1}),
    ],
)
@torch.no_grad()
def test_a_tokenizers_config_is_inferred_from_its_tensors(changes, options):
    torch.manual_seed(0)
    ours = VQVAE(TokenizerConfig(**{**TOKENIZER, **changes})).eval()
    loaded = load_tokenizer(released_tokenizer_state(ours), patch_nums=[1, 2, 4], **options)
    assert loaded.config == ours.config
    images = torch.rand(1, 3, ours.config.image_size, ours.config.image_size) * 2 - 1
    assert torch.equal(loaded.encode(images), ours.encode(images))
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in ours.state_dict().items())


@pytest.mark.parametrize(
    ("changes", "options"),
    [
        ({"width": 64, "num_heads": 2}, {}),
        ({"width": 64, "num_heads": 2, "shared_adaln": True}, {}),
        ({"width": 128, "num_heads": 2, "qk_norm": False}, {}),
        ({"width": 64, "num_heads": 4, "qk_norm": False}, {"num_heads": 4}),
        ({"width": 64, "num_heads": 2, "mlp_ratio": 2.5}, {}),
        ({"width": 60, "num_heads": 3, "mlp_ratio": 1.234}, {"mlp_ratio": 1.234}),
        ({"width": 64, "num_heads": 2, "norm_eps": 1e-5}, {"norm_eps": 1e-5}),
    ],
)
@torch.no_grad()
def test_a_transformers_config_is_inferred_from_its_tensors(changes, options):
    torch.manual_seed(0)
    ours = Transformer(
        TransformerConfig(**{**TRANSFORMER, "init_head": 1.0, "init_adaln_gamma": 1.0, **changes})
    ).eval()
    state = released_transformer_state(ours)
    loaded = load_transformer(state, **options)
    labels, features = torch.tensor([0, 3]), torch.randn(2, 20, 8)
    assert torch.equal(loaded(labels, features), ours(labels, features))
    assert loaded.config == TransformerConfig(**{**TRANSFORMER, **changes})
    assert loaded.undecayed_parameters() == ours.undecayed_parameters()


def test_computed_tensors_may_be_missing(tiny_transformer, transformer_state):
    bare = {
        name: tensor
        for name, tensor in transformer_state.items()
        if name not in ("lvl_1L", "attn_bias_for_masking") and "zero_k_bias" not in name
    }
    assert load_transformer(bare, patch_nums=(1, 2, 4)).config.step_lengths == (1, 4, 16)
    with pytest.raises(ConfigError, match="has 21 tokens in 3 scales, which no named schedule has"):
        load_transformer(bare)


@pytest.mark.parametrize("name", ["attn_bias_for_masking", "blocks.1.attn.zero_k_bias"])
def test_computed_tensors_with_other_values_are_refused(transformer_state, name):
    transformer_state[name] = transformer_state[name] + 1
    with pytest.raises(ArtifactError, match=f"not what it is computed from: {name}"):
        load_transformer(transformer_state, patch_nums=[1, 2, 4])


def test_half_and_quarter_precision_become_float32(tokenizer_state, tmp_path):
    for dtype in (torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float64):
        state = {name: tensor.to(dtype) for name, tensor in tokenizer_state.items()}
        write_tensors(tmp_path / "vae.safetensors", state)
        loaded = load_tokenizer(tmp_path / "vae.safetensors", patch_nums=[1, 2, 4])
        assert all(tensor.dtype == torch.float32 for tensor in loaded.state_dict().values())
        assert torch.equal(loaded.post_conv.weight, state["post_quant_conv.weight"].float())


def test_a_file_is_not_needed_after_loading(tokenizer_state, tmp_path):
    torch.save(tokenizer_state, tmp_path / "vae.pth")
    loaded = load_tokenizer(str(tmp_path / "vae.pth"), patch_nums=[1, 2, 4])
    (tmp_path / "vae.pth").write_bytes(b"")
    assert torch.equal(loaded.pre_conv.weight, tokenizer_state["quant_conv.weight"])


def test_a_loaded_model_shares_no_memory_with_the_state_dict(transformer_state):
    loaded = load_transformer(transformer_state)
    transformer_state["pos_start"].fill_(7)
    assert not (loaded.start_position == 7).any()
    assert not loaded.training


def test_a_quantizer_comes_alone_or_out_of_a_whole_tokenizer(tiny_tokenizer, tokenizer_state):
    alone = {name: tensor for name, tensor in tokenizer_state.items() if name.startswith("quantize.")}
    features = torch.randn(2, 8, 4, 4)
    for state in (alone, tokenizer_state):
        quantizer = load_quantizer(state, patch_nums=[1, 2, 4])
        assert torch.equal(quantizer.encode(features), tiny_tokenizer.quantizer.encode(features))


def test_use_counts_are_kept_where_their_scales_fit(tiny_tokenizer):
    tiny_tokenizer.quantizer.usage_KV.fill_(5)
    state = released_tokenizer_state(tiny_tokenizer)
    assert (load_quantizer(state, patch_nums=[1, 2, 4]).usage_KV == 5).all()
    assert load_quantizer(state, patch_nums=[1, 4]).usage_KV.tolist() == [[0.0] * 16] * 2
    del state["quantize.ema_vocab_hit_SV"]
    assert not load_quantizer(state, patch_nums=[1, 2, 4]).usage_KV.any()


def drop(name):
    return lambda state: state.pop(name)


def put(name, tensor):
    return lambda state: state.update({name: tensor})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("encoder.mid.attn_1.qkv.bias"), "1 missing: encoder.mid.attn_1.qkv.bias"),
        (drop("quantize.embedding.weight"), "lacks the weight `quantize.embedding.weight`"),
        (put("extra.weight", torch.ones(1)), "1 without a place: extra.weight"),
        (
            put("decoder.conv_out.bias", torch.ones(4)),
            r"1 of another shape: decoder.conv_out.bias \(4,\) instead of \(3,\)",
        ),
        (put("decoder.conv_out.bias", torch.ones(3, dtype=torch.int64)), "1 not floats: decoder.conv_out.bias"),
        (put("decoder.conv_out.bias", torch.tensor([1, torch.nan, 2])), "NaN or infinity in: decoder.conv_out.bias"),
        (put("encoder.conv_in.weight", torch.ones(32)), "does not fit"),
        (put("quant_conv.weight", torch.ones(8)), r"weight `quant_conv.weight` has shape \(8,\)"),
    ],
)
def test_a_tokenizer_that_does_not_fit_names_the_first_mismatch(tokenizer_state, change, message):
    change(tokenizer_state)
    with pytest.raises(ArtifactError, match=message):
        load_tokenizer(tokenizer_state, patch_nums=[1, 2, 4])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("blocks.0.ffn.fc2.weight"), "1 missing: blocks.0.ffn.fc2.weight"),
        (drop("head.weight"), "lacks the weight `head.weight`"),
        (drop("blocks.0.attn.scale_mul_1H11"), "1 without a place: blocks.1.attn.scale_mul_1H11"),
        (put("blocks.2.attn.q_bias", torch.ones(64)), r"missing: blocks.2.attn.v_bias, .*blocks.2"),
        (put("lvl_1L", torch.zeros(1, 21, dtype=torch.int64)), "has 21 tokens in 3 scales, but patch_nums 4 has"),
        (put("class_emb.weight", torch.ones(3)), "has shape"),
    ],
)
def test_a_transformer_that_does_not_fit_names_the_first_mismatch(transformer_state, change, message):
    change(transformer_state)
    with pytest.raises(ArtifactError, match=message):
        load_transformer(transformer_state)


def test_long_lists_of_mismatches_are_cut_to_ten_and_a_count(transformer_state):
    for index in range(30):
        transformer_state[f"odd.{index}"] = torch.ones(1)
    with pytest.raises(ArtifactError, match=r"30 without a place: odd\.0, .*odd\.9 and 20 more"):
        load_transformer(transformer_state)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 16}, "has depth = 2, but 16 was asked for"),
        ({"num_heads": 4}, "has num_heads = 2, but 4"),
        ({"embed_dim": 128}, "has embed_dim = 64, but 128"),
        ({"num_classes": 1000}, "has num_classes = 3, but 1000"),
        ({"mlp_ratio": 2.0}, "has mlp_ratio = 4.0, but 2.0"),
        ({"attn_l2_norm": False}, "has attn_l2_norm = True, but False"),
        ({"shared_aln": True}, "has shared_aln = False, but True"),
        ({"patch_nums": [1, 2, 3]}, "has 21 tokens in 3 scales, but patch_nums 1,2,3 has 14 in 3"),
        ({"seq_len": 22}, "has seq_len = 21, but 22"),
    ],
)
def test_options_that_contradict_a_transformer_are_refused(transformer_state, options, message):
    with pytest.raises(ArtifactError, match=message):
        load_transformer(transformer_state, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ch": 160}, "has ch = 32, but 160"),
        ({"ch_mult": [1, 1, 2, 2, 4]}, "has ch_mult = 1,1,1,1, but 1,1,2,2,4"),
        ({"vocab_size": 4096}, "has vocab_size = 16, but 4096"),
        ({"num_res_blocks": 2}, "has num_res_blocks = 1, but 2"),
        ({"quant_conv_ks": 1}, "has quant_conv_ks = 3, but 1"),
        ({"share_quant_resi": 4}, "has share_quant_resi = 2, but 4"),
        ({"quant_resi": 0.0}, "has phi convolutions, but quant_resi = 0.0"),
        ({"image_size": 64}, "has image_size = 32, but 64"),
    ],
)
def test_options_that_contradict_a_tokenizer_are_refused(tokenizer_state, options, message):
    with pytest.raises(ArtifactError, match=message):
        load_tokenizer(tokenizer_state, **{"patch_nums": [1, 2, 4], **options})


def test_the_wrong_one_of_the_two_models_is_said_to_be_so(tokenizer_state, transformer_state):
    with pytest.raises(ArtifactError, match="holds a VQVAE, but a VAR transformer is needed"):
        load_transformer(tokenizer_state)
    with pytest.raises(ArtifactError, match="holds a VAR transformer, but a VQVAE is needed"):
        load_tokenizer(transformer_state)
    with pytest.raises(ArtifactError, match="holds a VAR transformer, but a quantizer is needed"):
        load_quantizer(transformer_state)


def test_an_unnamed_number_of_scales_asks_for_patch_nums(tokenizer_state):
    with pytest.raises(ConfigError, match="has 3 scales, which no named schedule has"):
        load_tokenizer(tokenizer_state)


def test_trainer_checkpoints_give_both_models_without_options(trainer_checkpoint, tmp_path):
    torch.save(trainer_checkpoint, tmp_path / "ar-ckpt-best.pth")
    assert load_tokenizer(tmp_path / "ar-ckpt-best.pth").config.patch_nums == (1, 2, 4)
    assert load_transformer(tmp_path / "ar-ckpt-best.pth").config.step_lengths == (1, 4, 16)
