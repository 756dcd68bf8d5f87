"""What a path holds is found out by its content."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from released_names import released_tokenizer_state, released_transformer_state

from varcli.artifacts.manifest import write_manifest
from varcli.artifacts.write import append_json_line, write_arrays, write_json, write_tensors
from varcli.errors import ArtifactError, IntegrityError, UnsafeFileError
from varcli.report.describe import describe
from varcli.tokenizer.store import save_tokenizer
from varcli.transformer.store import save_transformer


@pytest.fixture
def model(tiny_tokenizer, tiny_transformer, tmp_path):
    folder = tmp_path / "model"
    fingerprint = save_tokenizer(folder / "tokenizer", tiny_tokenizer).info["fingerprint"]
    info = {"tokenizer": fingerprint, "patch_nums": [1, 2, 4], "order": "scale", "classes": ["a", "b", "c"]}
    save_transformer(folder / "transformer", tiny_transformer, info)
    return folder


def test_a_model_folder_and_its_parts(model, tiny_transformer, tiny_tokenizer):
    found = describe(model, verify=True)
    assert (found.kind, found.facts) == ("model", {"belong_together": True})
    tokenizer, transformer = found.parts
    assert tokenizer.summary == "a tokenizer for 32 px: 16 codes of 8 channels"
    assert tokenizer.facts["parameters"] == sum(parameter.numel() for parameter in tiny_tokenizer.parameters())
    assert transformer.summary == "a transformer of depth 2 for 3 classes, 21 tokens in 3 steps"
    assert transformer.facts["parameters"] == tiny_transformer.num_parameters
    assert transformer.facts["classes"] == ["a", "b", "c"] and transformer.facts["stored_as"] == ["F32"]


def test_a_model_whose_parts_do_not_belong_together(model, tiny_transformer):
    info = {"tokenizer": "0" * 16, "patch_nums": [1, 2, 4], "order": "scale"}
    save_transformer(model / "transformer", tiny_transformer, info)
    assert describe(model).facts == {"belong_together": False}


def test_a_run_with_its_last_numbers(model):
    write_json(model / "config.json", {"steps": 10})
    append_json_line(model / "metrics.jsonl", {"step": 10, "loss": 4.5})
    (model / "checkpoints" / "step-0000010").mkdir(parents=True)
    write_manifest(model / "checkpoints" / "step-0000010", "checkpoint", {"step": 10})
    write_json(model / "latest.json", {"checkpoint": "step-0000010"})
    found = describe(model)
    assert (found.kind, found.summary) == ("run", "a training run at step-0000010")
    assert found.facts["last_metrics"] == {"step": 10, "loss": 4.5} and len(found.parts) == 2
    assert describe(model / "checkpoints" / "step-0000010").summary == "a training checkpoint at step 10"


def test_codes_samples_and_kinds_to_come(tmp_path):
    split = {"shards": [], "rows": 7, "images": 7, "views": 1}
    codes = {
        "splits": {"train": split},
        "classes": ["a", "b"],
        "patch_nums": [1, 2],
        "tokenizer": "ab",
        "vocab_size": 16,
    }
    for name, info in {"codes": codes, "samples": {"cfg": 1.5, "seed": 0}, "spirals": {"turns": 3}}.items():
        (tmp_path / name).mkdir()
        write_manifest(tmp_path / name, name, info)
    assert describe(tmp_path / "codes").summary == "a codes cache: 7 rows of 5 codes, 2 classes"
    assert describe(tmp_path / "samples").facts["cfg"] == 1.5
    assert describe(tmp_path / "spirals").summary == "a spirals folder"


def test_images_in_class_folders(tiny_images):
    found = describe(tiny_images)
    assert (found.kind, found.summary) == ("images", "21 images in 3 classes")
    assert found.facts["splits"] == {"train": 15, "val": 6}


def test_released_weights_are_told_by_their_names(tiny_tokenizer, tiny_transformer, tmp_path):
    state = released_transformer_state(tiny_transformer)
    write_tensors(tmp_path / "var.safetensors", state)
    torch.save(state, tmp_path / "var.pth")
    trainer = {"var_wo_ddp": state, "vae_local": released_tokenizer_state(tiny_tokenizer)}
    torch.save({"trainer": trainer}, tmp_path / "ar-ckpt-last.pth")
    assert describe(tmp_path / "var.safetensors").facts["content"] == "a VAR transformer of depth 2"
    assert describe(tmp_path / "var.pth").facts["content"] == "a VAR transformer of depth 2"
    assert describe(tmp_path / "ar-ckpt-last.pth").facts["content"] == "a VQVAE and a VAR transformer of depth 2"


def test_a_pickle_is_looked_at_and_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (tmp_path / "proof").touch, ()

    torch.save({"a": torch.ones(2), "evil": Evil()}, tmp_path / "evil.pth")
    found = describe(tmp_path / "evil.pth")
    assert any("pathlib" in asked or "getattr" in asked for asked in found.facts["asks_for"])
    assert not (tmp_path / "proof").exists()


def test_arrays_are_listed_without_reading_them(tmp_path):
    write_arrays(tmp_path / "stats.npz", {"mu": np.zeros(3), "sigma": np.eye(3, dtype=np.float32)})
    assert describe(tmp_path / "stats.npz").facts["arrays"] == {"mu": "float64 (3,)", "sigma": "float32 (3, 3)"}
    (tmp_path / "cut.npz").write_bytes((tmp_path / "stats.npz").read_bytes()[:200])
    with pytest.raises(ArtifactError, match="is not a whole npz file"):
        describe(tmp_path / "cut.npz")


def test_damage_is_noticed(model):
    weights = model / "transformer" / "weights.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    describe(model)  # sizes agree
    with pytest.raises(IntegrityError, match="SHA-256 differs"):
        describe(model, verify=True)
    weights.write_bytes(data[:-8])
    with pytest.raises(IntegrityError, match=r"not whole: weights\.safetensors: .* bytes, manifest says"):
        describe(model)
    with pytest.raises(ArtifactError, match=r"is not whole: .* its header speaks of"):
        describe(weights)
    weights.unlink()
    with pytest.raises(IntegrityError, match="missing"):
        describe(model)


def test_an_edited_manifest_is_noticed(model):
    path = model / "tokenizer" / "manifest.json"
    value = json.loads(path.read_text())
    del value["info"]["config"]["patch_nums"]
    path.write_text(json.dumps(value))
    with pytest.raises(IntegrityError, match="lacks or garbles 'patch_nums'"):
        describe(model)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda path: None, ArtifactError, "does not exist"),
        (lambda path: path.mkdir(), ArtifactError, "is no artefact of varcli"),
        (lambda path: path.write_text("hello, world"), UnsafeFileError, "no format that varcli reads"),
        (lambda path: path.write_bytes(b""), ArtifactError, "is empty"),
    ],
)
def test_what_is_nothing_known_is_said_to_be_so(tmp_path, make, error, message):
    make(tmp_path / "thing")
    with pytest.raises(error, match=message):
        describe(tmp_path / "thing")


def test_describing_needs_no_torch(model):
    code = "import sys; from varcli.report.describe import describe; describe(sys.argv[1]); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code, str(model)], check=True)


def test_an_image_is_an_image(tmp_path):
    Image.new("CMYK", (30, 20)).save(tmp_path / "photo.jpg")
    found = describe(tmp_path / "photo.jpg")
    assert (found.kind, found.facts["size"]) == ("image", [30, 20])
    (tmp_path / "text.jpg").write_text("not an image")
    with pytest.raises(ArtifactError, match="is no image"):
        describe(tmp_path / "text.jpg")
