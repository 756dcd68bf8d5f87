"""Nothing is read that its manifest does not vouch for."""

from __future__ import annotations

import json
import random

import pytest
import torch

from varcli.artifacts.manifest import write_manifest
from varcli.artifacts.verify import (
    read_checked_tensors,
    read_json_lines,
    read_manifest,
    require_finite,
    verify_folder,
)
from varcli.artifacts.write import write_tensors
from varcli.errors import ArtifactError, IntegrityError


@pytest.fixture
def folder(tmp_path):
    write_tensors(tmp_path / "weights.safetensors", {"a": torch.arange(100.0)})
    write_manifest(tmp_path, "tokenizer", {"x": 1}, files=["weights.safetensors"])
    return tmp_path


def damage_truncate(data, rng):
    return data[: rng.randrange(len(data))]


def damage_flip(data, rng):
    position = rng.randrange(len(data))
    return data[:position] + bytes([data[position] ^ (1 << rng.randrange(8))]) + data[position + 1 :]


def damage_zero(data, rng):
    start = rng.randrange(len(data) - 16)
    return data[:start] + bytes(16) + data[start + 16 :]


def damage_extend(data, rng):
    return data + bytes(rng.randrange(1, 50))


@pytest.mark.parametrize("damage", [damage_truncate, damage_flip, damage_zero, damage_extend])
@pytest.mark.parametrize("seed", range(8))
def test_every_damage_is_found_before_the_bytes_are_used(folder, damage, seed):
    path = folder / "weights.safetensors"
    data = path.read_bytes()
    damaged = damage(data, random.Random(seed))
    if damaged == data:
        pytest.skip("this seed zeroed bytes that were zero")
    path.write_bytes(damaged)
    manifest = read_manifest(folder)
    with pytest.raises(IntegrityError, match="differs from its manifest"):
        read_checked_tensors(folder, "weights.safetensors", manifest)
    assert verify_folder(folder, manifest)


def test_a_whole_folder_has_no_problems(folder):
    assert verify_folder(folder, read_manifest(folder, "tokenizer")) == []


def test_digest_depends_on_content_alone(folder):
    first = read_manifest(folder).digest
    write_manifest(folder, "tokenizer", {"x": 1}, files=["weights.safetensors"])
    assert read_manifest(folder).digest == first
    write_manifest(folder, "tokenizer", {"x": 2}, files=["weights.safetensors"])
    assert read_manifest(folder).digest != first


def test_another_kind_a_newer_format_and_no_manifest_are_told_apart(folder):
    with pytest.raises(ArtifactError, match="is a tokenizer folder, but a codes folder"):
        read_manifest(folder, "codes")
    value = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**value, "format_version": 99}))
    with pytest.raises(ArtifactError, match="format 99") as caught:
        read_manifest(folder)
    assert "upgrade" in caught.value.hint
    with pytest.raises(ArtifactError, match="does not exist"):
        read_manifest(folder / "nowhere")
    with pytest.raises(ArtifactError, match="it is a file"):
        read_manifest(folder / "manifest.json", "codes")


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/b", "..", "a\x00b", "x" * 200])
def test_names_that_leave_the_folder_are_refused(folder, name):
    value = json.loads((folder / "manifest.json").read_text())
    value["files"][name] = value["files"]["weights.safetensors"]
    (folder / "manifest.json").write_text(json.dumps(value))
    with pytest.raises(IntegrityError, match="no varcli folder has"):
        read_manifest(folder)


@pytest.mark.parametrize("size", [-5, 2**40, 2**63])
def test_a_size_that_no_file_has_is_one_error_and_takes_no_memory(folder, size):
    value = json.loads((folder / "manifest.json").read_text())
    value["files"]["weights.safetensors"]["size"] = size
    (folder / "manifest.json").write_text(json.dumps(value))
    with pytest.raises(IntegrityError):
        read_checked_tensors(folder, "weights.safetensors", read_manifest(folder))


def test_a_link_in_place_of_a_file_is_not_followed(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "w"
    (folder / "weights.safetensors").rename(elsewhere)
    (folder / "weights.safetensors").symlink_to(elsewhere)
    with pytest.raises(ArtifactError, match="is a link"):
        read_checked_tensors(folder, "weights.safetensors", read_manifest(folder))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_are_named(value, dtype):
    fine = {
        "fine": torch.tensor([-2.0, 3.0]).to(dtype),
        "empty": torch.zeros(0, dtype=dtype),
        "count": torch.zeros(2).long(),
    }
    require_finite(fine, "the file")
    broken = torch.zeros(1000)
    broken[501] = value
    with pytest.raises(ArtifactError, match="in: broken"):
        require_finite({**fine, "broken": broken.to(dtype)}, "the file")


def test_a_torn_last_log_line_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"ste')
    assert [record["step"] for record in read_json_lines(path)] == [1, 2]
