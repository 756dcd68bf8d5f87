"""Options under the released code's names: misspelt ones are noticed, notes are left alone."""

from __future__ import annotations

import pytest

from varcli.errors import ArtifactError, ConfigError
from varcli.interop.options import TOKENIZER_OPTIONS, TRANSFORMER_OPTIONS, Options

# what stands beside the options in the golden files, arguments of the released constructors, options of the other model
NOTES = [
    "kind",
    "seed",
    "images",
    "tokens",
    "idx_margin_min",
    "codes_used_per_scale",
    "recon_clamped_fraction",
    "grad_norm_names",
    "n_params",
    "weights",
    "labels",
    "seq_len",
    "image_size",
    "in_channels",
    "greedy_gap_min",
    "kv_cache_vs_masked_forward_maxabs",
    "greedy_cfg1.5_unique_codes",
    "param_names",
    "no_weight_decay",
    "train_traj",
    "tokenizer",
    "sample_labels",
    "phi_index_per_scale",
    "grad_norms_rounding_noise",
    "cond_drop_rate",
    "attn_drop_rate",
    "flash_if_available",
    "fused_if_available",
    "test_mode",
    "depth",
    "z_channels",
]


@pytest.mark.parametrize("known", [TOKENIZER_OPTIONS, TRANSFORMER_OPTIONS])
@pytest.mark.parametrize("note", NOTES)
def test_notes_beside_the_options_are_left_alone(known, note):
    Options({note: 1}, known, "x")


@pytest.mark.parametrize("known", [TOKENIZER_OPTIONS, TRANSFORMER_OPTIONS])
def test_each_option_is_known_by_its_own_name(known):
    assert set(Options(dict.fromkeys(known, 1), known, "x").values) == set(known)


@pytest.mark.parametrize(
    ("misspelt", "known", "meant"),
    [
        ("patch_num", TOKENIZER_OPTIONS, "patch_nums"),
        ("v_patch_nums", TOKENIZER_OPTIONS, "patch_nums"),
        ("using_z_norm", TOKENIZER_OPTIONS, "using_znorm"),
        ("cosine_codes", TOKENIZER_OPTIONS, "using_znorm"),
        ("quant_residual", TOKENIZER_OPTIONS, "quant_resi"),
        ("share_quant_res", TOKENIZER_OPTIONS, "share_quant_resi"),
        ("num_head", TRANSFORMER_OPTIONS, "num_heads"),
        ("attn_l2norm", TRANSFORMER_OPTIONS, "attn_l2_norm"),
        ("shared_adaln", TRANSFORMER_OPTIONS, "shared_aln"),
        ("num_class", TRANSFORMER_OPTIONS, "num_classes"),
        ("Depth", TRANSFORMER_OPTIONS, "depth"),
    ],
)
def test_a_near_miss_names_the_option(misspelt, known, meant):
    with pytest.raises(ConfigError, match=f"unknown option `{misspelt}`") as raised:
        Options({misspelt: 1}, known, "x")
    assert f"`{meant}`" in raised.value.hint


def test_an_option_that_contradicts_the_weights_is_an_error():
    options = Options({"depth": 20, "ch_mult": [1, 2]}, TRANSFORMER_OPTIONS + TOKENIZER_OPTIONS, "var.pth")
    assert options.check("ch_mult", (1, 2)) == (1, 2)
    with pytest.raises(ArtifactError, match=r"`var\.pth` has depth = 16, but 20 was asked for"):
        options.check("depth", 16)


def test_patch_nums_are_found_by_scales_and_tokens():
    def find(num_scales, seq_len=None, **options):
        return Options(options, TRANSFORMER_OPTIONS, "x").patch_nums(num_scales, seq_len)

    assert find(10, 680)[-1] == 16 and find(10, 2240)[-1] == 32 and find(14)[-1] == 64
    assert find(10)[-1] == 16 and find(None)[-1] == 16
    assert find(10, 681) is None
    assert find(10, 680, patch_nums=[1, 2, 4]) == (1, 2, 4)
    assert find(10, 680, patch_nums="1_2_4") == (1, 2, 4)
    with pytest.raises(ConfigError, match="patch_nums must be whole numbers"):
        find(3, patch_nums=7)
