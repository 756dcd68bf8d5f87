"""Laws of the whole tokenizer and of its folder on disk."""

from __future__ import annotations

import json

import pytest
import torch

from varcli.artifacts.verify import read_manifest
from varcli.errors import ConfigError, IntegrityError, ShapeError
from varcli.tokenizer import TOKENIZERS, VQVAE, TokenizerConfig
from varcli.tokenizer.store import load_tokenizer, save_tokenizer


@pytest.mark.parametrize("name", TOKENIZERS)
def test_every_tokenizer_maps_images_to_codes_and_back(name, tiny_tokenizer):
    tokenizer = TOKENIZERS[name](tiny_tokenizer.config).eval()
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    codes = tokenizer.encode(images)
    assert codes.dtype == torch.int64
    assert codes.shape == (2, tokenizer.config.scales.seq_len)
    assert 0 <= codes.min() and codes.max() < tokenizer.config.vocab_size
    decoded = tokenizer.decode(tokenizer.quantizer.embed(codes))
    assert decoded.shape == images.shape
    assert decoded.abs().max() <= 1


@pytest.mark.parametrize(("levels", "size"), [(4, 64), (5, 128)])
def test_downsampling_follows_from_the_levels(levels, size):
    config = TokenizerConfig(patch_nums=(1, 2, 8), width=32, channel_multipliers=(1,) * levels, num_res_blocks=1)
    assert config.downsampling == size // 8
    assert config.image_size == size
    assert VQVAE(config).encode(torch.zeros(1, 3, size, size)).shape == (1, 69)


def test_encoding_an_image_does_not_depend_on_its_batch(tiny_tokenizer):
    images = torch.rand(5, 3, 32, 32) * 2 - 1
    together = tiny_tokenizer.encode(images)
    alone = torch.cat([tiny_tokenizer.encode(image[None]) for image in images])
    assert torch.equal(together, alone)


def test_saved_tokenizer_comes_back_the_same(tiny_tokenizer, tmp_path):
    manifest = save_tokenizer(tmp_path / "t", tiny_tokenizer, {"source": "test"})
    loaded = load_tokenizer(tmp_path / "t")
    assert loaded.fingerprint() == tiny_tokenizer.fingerprint() == manifest.info["fingerprint"]
    assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), tiny_tokenizer.state_dict().values()))


def test_half_precision_folder_has_the_fingerprint_a_reader_computes(tiny_tokenizer, tmp_path):
    manifest = save_tokenizer(tmp_path / "t", tiny_tokenizer, dtype=torch.float16)
    assert load_tokenizer(tmp_path / "t").fingerprint() == manifest.info["fingerprint"]
    assert manifest.info["fingerprint"] != tiny_tokenizer.fingerprint()


def test_fingerprint_changes_with_a_single_weight(tiny_tokenizer):
    before = tiny_tokenizer.fingerprint()
    with torch.no_grad():
        tiny_tokenizer.decoder.conv_out.bias[0] += 1e-3
    assert tiny_tokenizer.fingerprint() != before


def test_a_flipped_byte_is_named(tiny_tokenizer, tmp_path):
    save_tokenizer(tmp_path / "t", tiny_tokenizer)
    path = tmp_path / "t" / "weights.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(IntegrityError, match=r"weights\.safetensors"):
        load_tokenizer(tmp_path / "t")
    assert read_manifest(tmp_path / "t").kind == "tokenizer"


def test_images_of_another_size_or_type_are_refused(tiny_tokenizer):
    with pytest.raises(ShapeError, match="32"):
        tiny_tokenizer.encode(torch.zeros(1, 3, 64, 64))
    with pytest.raises(ShapeError, match="floats"):
        tiny_tokenizer.encode(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))


def test_a_width_that_group_norm_cannot_split_is_refused():
    with pytest.raises(ConfigError, match="multiple of norm_groups"):
        TokenizerConfig(width=40)


def test_cosine_codes_stand_in_the_manifest_and_encode_the_same_after_reading(tmp_path):
    torch.manual_seed(0)
    sizes = {"patch_nums": (1, 2, 4), "vocab_size": 64, "code_channels": 8, "width": 32}
    config = TokenizerConfig(**sizes, channel_multipliers=(1, 1), num_res_blocks=1, cosine_codes=True)
    tokenizer = VQVAE(config).eval()
    with torch.no_grad():  # codes of very different lengths, so that angle and distance disagree
        tokenizer.quantizer.codebook.weight *= torch.linspace(0.01, 3, 64).view(-1, 1)
    manifest = save_tokenizer(tmp_path / "t", tokenizer)
    assert manifest.info["config"]["cosine_codes"] is True
    loaded, images = load_tokenizer(tmp_path / "t"), torch.rand(4, 3, 8, 8) * 2 - 1
    codes = tokenizer.encode(images)
    assert torch.equal(loaded.encode(images), codes)
    loaded.quantizer.cosine_codes = False
    assert not torch.equal(loaded.encode(images), codes)


def test_a_folder_from_before_cosine_codes_is_read_as_one_of_distances(tiny_tokenizer, tmp_path):
    save_tokenizer(tmp_path / "t", tiny_tokenizer)
    path = tmp_path / "t" / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["info"]["config"]["cosine_codes"]
    path.write_text(json.dumps(manifest))
    assert load_tokenizer(tmp_path / "t").config == tiny_tokenizer.config
