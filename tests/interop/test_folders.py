"""Import and export: released files to a model folder and back, bit for bit."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch
from released_names import released_transformer_state

from varcli.artifacts.lock import lock_folder
from varcli.artifacts.verify import read_manifest, read_tensors, verify_folder
from varcli.errors import ArtifactError, ConfigError, LockedError
from varcli.interop.official import export_official, import_official, load_tokenizer, load_transformer
from varcli.tokenizer import VQVAE, TokenizerConfig
from varcli.tokenizer import store as tokenizers
from varcli.transformer import Transformer, TransformerConfig
from varcli.transformer import store as transformers


@pytest.fixture
def files(tokenizer_state, transformer_state, tmp_path):
    torch.save(tokenizer_state, tmp_path / "vae_tiny.pth")
    torch.save(transformer_state, tmp_path / "var_d2.pth")
    return [tmp_path / "var_d2.pth", tmp_path / "vae_tiny.pth"]


def same(first, second):
    assert first.keys() == second.keys()
    return all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_an_import_writes_a_model_folder_tied_together(files, tiny_tokenizer, tiny_transformer, tmp_path):
    steps = []
    result = import_official(files, tmp_path / "models" / "tiny", on_step=steps.append)
    tokenizer = tokenizers.load_tokenizer(result.folder / "tokenizer")
    transformer, manifest = transformers.load_transformer(result.folder / "transformer")
    assert same(tokenizer.state_dict(), tiny_tokenizer.state_dict())
    assert same(transformer.state_dict(), tiny_transformer.state_dict())
    assert tokenizer.config == tiny_tokenizer.config
    assert manifest.info["tokenizer"] == result.fingerprint == tiny_tokenizer.fingerprint()
    assert (manifest.info["patch_nums"], manifest.info["order"]) == ([1, 2, 4], "scale")
    digest = hashlib.sha256(files[0].read_bytes()).hexdigest()
    assert manifest.info["source"] == {"file": "var_d2.pth", "sha256": digest, "layout": "weights"}
    assert read_manifest(result.folder / "tokenizer").info["source"]["file"] == "vae_tiny.pth"
    assert result.num_parameters["transformer"] == tiny_transformer.num_parameters
    assert [step.done for step in steps] == list(range(5)) and steps[-1].total == 4


def test_an_export_gives_back_exactly_what_was_imported(files, tokenizer_state, transformer_state, tmp_path):
    import_official(files, tmp_path / "model")
    result = export_official(tmp_path / "model", tmp_path / "released")
    assert result.files == ("vae_ch32v16z8.safetensors", "var_d2.safetensors", "config.json")
    assert same(dict(read_tensors(result.folder / result.files[0])), tokenizer_state)
    assert same(dict(read_tensors(result.folder / result.files[1])), transformer_state)
    assert read_tensors(result.folder / result.files[1])["lvl_1L"].dtype == torch.int64
    assert verify_folder(result.folder, read_manifest(result.folder)) == []
    assert not list(result.folder.glob("*.pth"))


def test_an_exports_options_load_its_weights(tiny_tokenizer, tmp_path):
    model = Transformer(
        TransformerConfig(
            step_lengths=(1, 4, 16), vocab_size=16, code_channels=8, num_classes=3, depth=1, width=48, num_heads=3,
            qk_norm=False, mlp_ratio=2.0, norm_eps=1e-5, shared_adaln=True, drop_path=0.1, dropout=0.2,
        )
    )  # fmt: skip
    info = {"tokenizer": tiny_tokenizer.fingerprint(), "patch_nums": [1, 2, 4], "order": "scale"}
    tokenizers.save_tokenizer(tmp_path / "model" / "tokenizer", tiny_tokenizer)
    transformers.save_transformer(tmp_path / "model" / "transformer", model, info)
    result = export_official(tmp_path / "model", tmp_path / "released")
    options = json.loads((result.folder / "config.json").read_text())
    loaded = load_transformer(result.folder / "var_d1.safetensors", **options["transformer"])
    assert loaded.config == TransformerConfig(**{**vars(model.config), "init_adaln_gamma": 1e-3})
    assert same(loaded.state_dict(), model.state_dict())
    again = load_tokenizer(result.folder / "vae_ch32v16z8.safetensors", **options["tokenizer"])
    assert again.config == tiny_tokenizer.config and again.fingerprint() == tiny_tokenizer.fingerprint()
    assert any("16 wide" in note for note in result.notes)


def test_an_export_says_what_the_released_code_does_not_know(tmp_path):
    config = TokenizerConfig(patch_nums=(1, 2), width=16, norm_groups=8, channel_multipliers=(1, 1), num_res_blocks=1)
    tokenizers.save_tokenizer(tmp_path / "model" / "tokenizer", VQVAE(config))
    result = export_official(tmp_path / "model", tmp_path / "released")
    assert "8 groups, and the released code always 32" in result.notes[0]


def test_a_trainer_checkpoint_is_imported_whole(trainer_checkpoint, tiny_tokenizer, tmp_path):
    torch.save(trainer_checkpoint, tmp_path / "ar-ckpt-last.pth")
    result = import_official([tmp_path / "ar-ckpt-last.pth"], tmp_path / "model")
    assert result.fingerprint == tiny_tokenizer.fingerprint()
    manifest = read_manifest(result.folder / "transformer")
    assert manifest.info["source"]["layout"] == "trainer checkpoint"


def test_a_tokenizer_alone_is_imported_for_tokenizing(files, tmp_path):
    result = import_official(files[1:], tmp_path / "model", {"patch_nums": "1,2,4"})
    assert result.transformer is None
    assert (tmp_path / "model" / "tokenizer" / "manifest.json").is_file()
    assert not (tmp_path / "model" / "transformer").exists()
    assert export_official(tmp_path / "model", tmp_path / "released").files[0].startswith("vae")


def test_importing_the_same_files_again_is_fine_and_others_are_not(files, tmp_path):
    import_official(files, tmp_path / "model")
    import_official(files, tmp_path / "model")
    state = torch.load(files[0], weights_only=True)
    state["head.bias"] += 1
    torch.save(state, files[0])
    with pytest.raises(ArtifactError, match=r"transformer` exists and was not made from `var_d2\.pth`") as raised:
        import_official(files, tmp_path / "model")
    assert raised.value.hint == "choose another --out"


def test_parts_that_are_missing_or_twice_are_named(files, tmp_path):
    with pytest.raises(ArtifactError, match="there is no VQVAE in") as raised:
        import_official(files[:1], tmp_path / "model")
    assert "vae_ch160v4096z32.pth" in raised.value.hint
    with pytest.raises(ArtifactError, match="both hold a tokenizer"):
        import_official([*files, files[1]], tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_models_that_do_not_belong_together_are_refused(files, tmp_path):
    config = TransformerConfig(
        step_lengths=(1, 4, 16), vocab_size=32, code_channels=8, num_classes=3, depth=2, width=64, num_heads=2
    )
    torch.save(released_transformer_state(Transformer(config)), files[0])
    with pytest.raises(ArtifactError, match=r"has 16 codes, but .* was trained for 32"):
        import_official(files, tmp_path / "model")


def test_an_unknown_option_is_refused(files, tmp_path):
    with pytest.raises(ConfigError, match="unknown option `patchnums`"):
        import_official(files, tmp_path / "model", {"patchnums": [1, 2, 4]})


def test_a_folder_being_written_is_left_alone(files, tmp_path):
    (tmp_path / "model").mkdir()
    with lock_folder(tmp_path / "model"), pytest.raises(LockedError):
        import_official(files, tmp_path / "model")


def test_only_model_folders_are_exported(tmp_path):
    with pytest.raises(ArtifactError, match="holds neither tokenizer/ nor transformer/"):
        export_official(tmp_path, tmp_path / "out")
