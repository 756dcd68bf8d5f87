"""What is found in a file of the released code."""

from __future__ import annotations

import pytest
import torch

from varcli.artifacts.write import write_tensors
from varcli.errors import ArtifactError
from varcli.interop.checkpoint import kind_of, read_checkpoint


def test_bare_weights_are_told_apart_by_their_names(tokenizer_state, transformer_state):
    found = read_checkpoint(tokenizer_state)
    assert (found.content, found.layout) == ("a VQVAE", "weights")
    assert read_checkpoint(transformer_state).content == "a VAR transformer"
    quantizer = {name: tensor for name, tensor in tokenizer_state.items() if name.startswith("quantize.")}
    assert read_checkpoint(quantizer).content == "a quantizer"
    assert kind_of(["a", "b"]) is None


def test_a_trainer_checkpoint_holds_both_models_and_its_patch_nums(trainer_checkpoint, tmp_path):
    torch.save(trainer_checkpoint, tmp_path / "ar-ckpt-last.pth")
    found = read_checkpoint(tmp_path / "ar-ckpt-last.pth")
    assert (found.content, found.layout) == ("a VQVAE and a VAR transformer", "trainer checkpoint")
    assert found.patch_nums == (1, 2, 4)
    for name, tensor in trainer_checkpoint["trainer"]["var_wo_ddp"].items():
        assert torch.equal(found.transformer[name], tensor)


@pytest.mark.parametrize("prefix", ["", "trainer."])
def test_a_trainer_checkpoint_with_flat_names_is_the_same(trainer_checkpoint, tmp_path, prefix):
    trainer = trainer_checkpoint["trainer"]
    flat = {f"{prefix}{part}.{n}": t.clone() for part in ("var_wo_ddp", "vae_local") for n, t in trainer[part].items()}
    flat[f"{prefix}var_opt.0.exp_avg"] = torch.ones(2)
    write_tensors(tmp_path / "ar-ckpt-last.safetensors", flat)
    found = read_checkpoint(tmp_path / "ar-ckpt-last.safetensors")
    assert set(found.transformer) == set(trainer["var_wo_ddp"]) and set(found.tokenizer) == set(trainer["vae_local"])


def test_prefixes_of_torch_compile_are_taken_off(transformer_state):
    compiled = {f"_orig_mod.{name}": tensor for name, tensor in transformer_state.items()}
    assert set(read_checkpoint(compiled).transformer) == set(transformer_state)
    with pytest.raises(ArtifactError, match="`pos_start` twice"):
        read_checkpoint(compiled | {"pos_start": compiled["_orig_mod.pos_start"]})


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({}, "holds no weights of VAR or its VQVAE, but nothing"),
        ({"conv1.weight": torch.ones(1)}, "holds no weights of VAR or its VQVAE, but `conv1.weight`"),
        ({"model": {"pos_start": torch.ones(1)}}, "holds a dict under `model`, where a tensor should be"),
        ({"pos_start": torch.ones(1), "epoch": 3}, "holds a int under `epoch`"),
        ({3: torch.ones(1)}, "holds a Tensor under `3`"),
        ({"trainer": {"var_wo_ddp": {"pos_start": [1]}}}, "holds a list under `pos_start`"),
    ],
)
def test_other_contents_are_named(value, message):
    with pytest.raises(ArtifactError, match=message) as raised:
        read_checkpoint(value)
    assert "trainer.var_wo_ddp" in raised.value.hint
