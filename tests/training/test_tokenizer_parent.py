"""Fine-tuning: it starts where the parent stood, keeps what is frozen bit for bit, and says what cannot be."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_tokenizer import SMALL
from typer.testing import CliRunner

from varcli import config as configs
from varcli.artifacts.verify import read_json, read_manifest
from varcli.cli.app import app
from varcli.errors import ArtifactError, ConfigError
from varcli.tokenizer import VQVAE
from varcli.tokenizer.store import load_tokenizer, save_tokenizer
from varcli.training.tokenizer import train_tokenizer
from varcli.training.tokenizer_parent import TokenizerParent, load_parent
from varcli.training.tokenizer_settings import PARTS, TokenizerTrainConfig


def config(**changes) -> TokenizerTrainConfig:
    values = {"steps": 4, "batch_size": 4, "perceptual_weight": 0.0, "restart_every": 2, "validate_every": 0}
    return TokenizerTrainConfig(**{**values, "save_every": 2, "adversarial_start": 0.5, **changes})


def images_for(tokenizer: VQVAE, count: int = 3) -> torch.Tensor:
    side = tokenizer.config.image_size
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(3)) * 2 - 1


def save(folder: Path, **changes) -> VQVAE:
    """A tokenizer as training leaves one, with usage counts."""
    torch.manual_seed(5)
    made = VQVAE(replace(SMALL, **changes)).eval()
    made.quantizer.usage_KV.copy_(torch.rand(made.quantizer.usage_KV.shape) + 0.5)
    save_tokenizer(folder, made, {"step": 1, "steps": 1})
    return made


@pytest.fixture
def parent(tmp_path) -> VQVAE:
    return save(tmp_path / "parent")


def test_a_tiny_learning_rate_reproduces_the_parent_and_its_fingerprint_is_written(tiny_images, tmp_path, parent):
    out = tmp_path / "run"
    train_tokenizer(
        tiny_images, out, config(learning_rate=1e-9, restart_every=0), init_from=tmp_path / "parent", device="cpu"
    )
    child, x = load_tokenizer(out / "tokenizer"), images_for(parent)
    assert child.config == parent.config
    assert torch.equal(child.encode(x), parent.encode(x))
    torch.testing.assert_close(
        child.decode(child.quantizer.embed(child.encode(x))), parent.decode(parent.quantizer.embed(parent.encode(x)))
    )
    for where in (read_manifest(out / "tokenizer", "tokenizer").info, read_json(out / "config.json")["inputs"]):
        assert where["init_from"] == parent.fingerprint()


@pytest.mark.parametrize("frozen", [("encoder",), ("encoder", "quantizer"), ("quantizer", "decoder"), ("decoder",)])
def test_frozen_parts_are_bit_identical_and_the_others_learn(tiny_images, tmp_path, parent, frozen):
    settings = config(frozen=frozen, learning_rate=1e-3)
    train_tokenizer(tiny_images, tmp_path / "run", settings, init_from=tmp_path / "parent", device="cpu")
    child = load_tokenizer(tmp_path / "run" / "tokenizer")
    for part, modules in PARTS.items():
        for name in modules:
            before, after = (model.get_submodule(name).state_dict() for model in (parent, child))
            same = [torch.equal(before[key], after[key]) for key in before]
            assert all(same) if part in frozen else not all(same), name
    if set(frozen) == {"encoder", "quantizer"}:
        assert torch.equal(child.encode(images_for(child)), parent.encode(images_for(parent)))


def test_a_stopped_fine_tuning_goes_on_bit_for_bit_when_the_parent_is_gone(tiny_images, tmp_path, parent):
    class Stop(Exception):
        pass

    def stop(step):
        if step.unit == "steps" and step.done >= 3:
            raise Stop

    settings = config(learning_rate=1e-3, log_every=1)
    train_tokenizer(tiny_images, tmp_path / "whole", settings, init_from=tmp_path / "parent", device="cpu")
    with pytest.raises(Stop):
        train_tokenizer(
            tiny_images, tmp_path / "cut", settings, init_from=tmp_path / "parent", device="cpu", on_step=stop
        )
    shutil.rmtree(tmp_path / "parent")
    train_tokenizer(tiny_images, tmp_path / "cut", settings, device="cpu")
    train_tokenizer(tiny_images, tmp_path / "cut", settings, init_from=tmp_path / "parent", device="cpu")
    whole, cut = (load_tokenizer(tmp_path / name / "tokenizer") for name in ("whole", "cut"))
    assert whole.fingerprint() == cut.fingerprint()
    assert read_manifest(tmp_path / "cut" / "tokenizer", "tokenizer").info["init_from"] == parent.fingerprint()


def test_a_run_folder_is_a_parent_and_another_one_is_refused_later(tiny_images, tmp_path, parent):
    train_tokenizer(tiny_images, tmp_path / "first", config(tokenizer=SMALL), device="cpu")
    train_tokenizer(tiny_images, tmp_path / "second", config(), init_from=tmp_path / "first", device="cpu")
    found = load_tokenizer(tmp_path / "first" / "tokenizer").fingerprint()
    assert read_json(tmp_path / "second" / "config.json")["inputs"]["init_from"] == found
    with pytest.raises(ConfigError, match=f"begun from the tokenizer {found}, but .* is {parent.fingerprint()}"):
        train_tokenizer(tiny_images, tmp_path / "second", config(), init_from=tmp_path / "parent", device="cpu")
    with pytest.raises(ConfigError, match="begun without --init-from"):
        train_tokenizer(tiny_images, tmp_path / "first", config(), init_from=tmp_path / "parent", device="cpu")


@pytest.mark.parametrize(
    "changes, text",
    [
        ({"codebook_init": "data"}, "the codebook comes with the tokenizer"),
        ({"tokenizer": replace(SMALL, width=16)}, "tokenizer.width is 8 .* 16 is asked for"),
        ({"tokenizer": replace(SMALL, vocab_size=32)}, "tokenizer.vocab_size"),
    ],
)
def test_settings_against_the_parent_are_refused_and_leave_no_trace(tiny_images, tmp_path, parent, changes, text):
    with pytest.raises(ConfigError, match=text):
        train_tokenizer(tiny_images, tmp_path / "run", config(**changes), init_from=tmp_path / "parent", device="cpu")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["nowhere", "images"])
def test_a_folder_without_a_tokenizer_is_refused(tiny_images, tmp_path, name):
    with pytest.raises(ArtifactError, match="tokenizer"):
        train_tokenizer(tiny_images, tmp_path / "run", config(), init_from=tmp_path / name, device="cpu")


def test_what_has_not_learned_cannot_be_frozen():
    with pytest.raises(ConfigError, match="part to freeze `encodr`"):
        config(frozen=("encodr",))
    with pytest.raises(ConfigError, match="nothing is left to learn"):
        config(frozen=("encoder", "decoder", "quantizer"))
    assert configs.from_dict(TokenizerTrainConfig, {"frozen": "encoder, quantizer"}).frozen == ("encoder", "quantizer")


def test_nothing_is_frozen_without_a_parent(tiny_images, tmp_path):
    with pytest.raises(ConfigError, match="before having learned"):
        train_tokenizer(tiny_images, tmp_path / "run", config(tokenizer=SMALL, frozen=("encoder",)), device="cpu")


@pytest.mark.parametrize("num_phis", [0, 1, 2, 4])
def test_another_resolution_keeps_the_weights_where_the_phis_allow_it(num_phis):
    before = TokenizerParent(fingerprint="0" * 16, config=replace(SMALL, num_phis=num_phis), folder=None)
    wanted = before.inherit({"patch_nums": [1, 2, 3, 8]} if num_phis else {"patch_nums": [1, 2, 8]})
    assert wanted.image_size == 2 * before.config.image_size
    child, made = VQVAE(wanted), VQVAE(before.config)
    load_parent(child, made, batch_size=4)
    assert torch.equal(child.quantizer.codebook.weight, made.quantizer.codebook.weight)
    assert not child.quantizer.usage_KV.any()  # it had none
    if not num_phis:
        with pytest.raises(ConfigError, match=r"4 scales, but .* its 3"):
            before.inherit({"patch_nums": [1, 2, 3, 8]})


@pytest.mark.parametrize("patch_nums", [(1, 2, 4), (1, 2, 3, 8)])
def test_usage_is_scaled_to_the_picks_of_a_batch(tmp_path, patch_nums):
    made, wanted = save(tmp_path / "parent"), replace(SMALL, patch_nums=patch_nums)
    child = VQVAE(wanted)
    load_parent(child, made, batch_size=10)
    picks = torch.tensor(wanted.scales.step_lengths) * 10.0
    torch.testing.assert_close(child.quantizer.usage_KV.sum(dim=1), picks)
    if patch_nums == made.config.patch_nums:
        load_parent(child, made, batch_size=None)
        assert torch.equal(child.quantizer.usage_KV, made.quantizer.usage_KV)


def test_the_command_fine_tunes_at_another_resolution_and_goes_on(tiny_images, tmp_path, parent):
    arguments = ["train-tokenizer", str(tiny_images), "--out", str(tmp_path / "run"), "--device", "cpu", "--json"]
    arguments += ["--steps", "2", "--batch-size", "2", "--set", "tokenizer.patch_nums=[1,2,3,8]"]
    arguments += ["--set", "perceptual_weight=0", "--set", "frozen=encoder,quantizer"]
    started = CliRunner().invoke(app, [*arguments, "--init-from", str(tmp_path / "parent")])
    assert started.exit_code == 0, started.output
    assert json.loads(started.stdout)["steps"] == 2
    assert load_tokenizer(tmp_path / "run" / "tokenizer").config == replace(SMALL, patch_nums=(1, 2, 3, 8))
    again = CliRunner().invoke(app, arguments)
    assert again.exit_code == 0, again.output
    refused = CliRunner().invoke(app, [*arguments, "--set", "tokenizer.width=16"])
    assert refused.exit_code == 1 and "tokenizer.width is 8" in refused.stderr
