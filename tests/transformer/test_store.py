"""Transformers on disk: what is written is what is read, and what does not fit is refused."""

from __future__ import annotations

import json

import pytest
import torch

from varcli.artifacts import verify
from varcli.artifacts.manifest import write_manifest
from varcli.artifacts.tensors import parse_tensors
from varcli.artifacts.verify import read_manifest
from varcli.artifacts.write import write_tensors
from varcli.errors import ArtifactError, ConfigError, IntegrityError
from varcli.transformer.store import WEIGHTS_NAME, load_transformer, save_transformer

INFO = {"tokenizer": "0123456789abcdef", "patch_nums": [1, 2, 4], "order": "scale", "classes": ["a", "b", "c"]}


@torch.no_grad()
def test_a_saved_transformer_computes_the_same_after_loading(tiny_transformer, tmp_path):
    written = save_transformer(tmp_path / "model", tiny_transformer, INFO)
    loaded, manifest = load_transformer(tmp_path / "model")
    labels, features = torch.tensor([0, 2]), torch.randn(2, 20, 8)
    assert torch.equal(loaded(labels, features), tiny_transformer(labels, features))
    assert loaded.config == tiny_transformer.config and not loaded.training
    assert manifest == written and manifest.info["tokenizer"] == INFO["tokenizer"]
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_half_precision_halves_the_file_and_loads_as_float32(tiny_transformer, tmp_path):
    save_transformer(tmp_path / "half", tiny_transformer, INFO, dtype=torch.float16)
    loaded, manifest = load_transformer(tmp_path / "half")
    weights = loaded.state_dict()
    assert all(tensor.dtype == torch.float32 for tensor in weights.values())
    assert manifest.files[WEIGHTS_NAME].size < 2.2 * tiny_transformer.num_parameters
    for name, tensor in tiny_transformer.state_dict().items():
        assert torch.equal(weights[name], tensor.half().float())


def test_changed_bytes_are_noticed(tiny_transformer, tmp_path):
    save_transformer(tmp_path, tiny_transformer, INFO)
    path = tmp_path / WEIGHTS_NAME
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(IntegrityError, match="differs from its manifest"):
        load_transformer(tmp_path)


def rewrite(folder, change_info=lambda info: None, change_weights=lambda weights: None):
    """Change a model folder and sign it again, as somebody with another model would."""
    manifest = read_manifest(folder)
    info = json.loads(json.dumps(manifest.info))
    from varcli.artifacts.verify import read_tensors

    weights = dict(read_tensors(folder / WEIGHTS_NAME))
    change_info(info)
    change_weights(weights)
    write_tensors(folder / WEIGHTS_NAME, weights)
    write_manifest(folder, "transformer", info, files=[WEIGHTS_NAME])


@pytest.mark.parametrize(
    ("change_info", "change_weights", "message"),
    [
        (lambda info: info["config"].update(depth=3), lambda w: None, r"lacks the weight `blocks\.2\."),
        (lambda info: info["config"].update(depth=1), lambda w: None, r"no place for: `blocks\.1\."),
        (
            lambda info: info["config"].update(num_classes=9),
            lambda w: None,
            r"`class_embedding.weight` has shape \(4, 64\)",
        ),
        (lambda info: info.pop("config"), lambda w: None, "has no config"),
        (lambda info: info["config"].update(width=10**9), lambda w: None, "at most 1,048,576"),
        (lambda info: info["config"].update(depth=100_000), lambda w: None, "at most 1,000"),
        (
            lambda info: None,
            lambda w: w.update(positions=w["positions"].int()),
            "`positions` holds int32, its config needs float32",
        ),
        (lambda info: None, lambda w: w["positions"].fill_(float("nan")), "NaN or infinity in: positions"),
    ],
)
def test_weights_that_do_not_fit_their_config_are_refused(
    tiny_transformer, tmp_path, change_info, change_weights, message
):
    save_transformer(tmp_path, tiny_transformer, INFO)
    rewrite(tmp_path, change_info, change_weights)
    with pytest.raises((ArtifactError, ConfigError), match=message):
        load_transformer(tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_nothing_else_of_the_file_alive(tiny_transformer, tmp_path, dtype, monkeypatch):
    save_transformer(tmp_path, tiny_transformer, INFO)
    read = []
    monkeypatch.setattr(verify, "parse_tensors", lambda data, path: read.append(data) or parse_tensors(data, path))
    model, _ = load_transformer(tmp_path, dtype=dtype)
    start = torch.frombuffer(read[0], dtype=torch.uint8).data_ptr()
    assert not [name for name, one in model.named_parameters() if start <= one.data_ptr() < start + len(read[0])]


def test_numbers_beyond_fp16_are_told_as_such(tiny_transformer, tmp_path):
    save_transformer(tmp_path, tiny_transformer, INFO)
    rewrite(tmp_path, change_weights=lambda weights: weights["blocks.0.attention.qkv.weight"].fill_(1e5))
    load_transformer(tmp_path, dtype=torch.bfloat16)
    with pytest.raises(ArtifactError, match=r"attention\.qkv\.weight") as caught:
        load_transformer(tmp_path, dtype=torch.float16)
    assert "--precision bf16" in caught.value.hint
    rewrite(tmp_path, change_weights=lambda weights: weights["blocks.0.attention.qkv.weight"].fill_(float("nan")))
    with pytest.raises(ArtifactError, match=r"attention\.qkv\.weight"):
        load_transformer(tmp_path, dtype=torch.bfloat16)
