"""Checkpoints: the last two stay, damage is named, going back is asked for, nothing half is ever found."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path

import pytest
import torch
from toy_trainer import ToyTrainer, train_toy

from varcli.artifacts.verify import read_manifest
from varcli.distributed import World
from varcli.errors import ArtifactError, ConfigError, IntegrityError
from varcli.training.checkpoint import (
    await_checkpoint,
    find_checkpoint,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
)
from varcli.training.run import RunFolder, open_run
from varcli.training.state import Parts, capture_random, restore_random, undisturbed


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run with checkpoints after 15 and 20 steps."""
    train_toy(tmp_path / "run")
    return tmp_path / "run"


def test_the_last_two_stay_and_latest_names_the_newest(run):
    assert [folder.name for folder in list_checkpoints(run)] == ["step-0000020", "step-0000015"]
    assert json.loads((run / "latest.json").read_text()) == {"checkpoint": "step-0000020"}
    assert {path.suffix for path in list_checkpoints(run)[0].iterdir()} == {".safetensors", ".json"}


def test_each_checkpoint_names_the_one_before(run):
    newest, before = (read_manifest(folder, "checkpoint") for folder in list_checkpoints(run))
    assert newest.info["parent"] == before.digest


DAMAGE = {
    "flipped": lambda path: path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1])),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-9]),
    "missing": Path.unlink,
    "emptied": lambda path: path.write_bytes(b""),
}


@pytest.mark.parametrize("name", ["toy.safetensors", "optimizer.safetensors", "random.safetensors", "manifest.json"])
@pytest.mark.parametrize("damage", DAMAGE.values(), ids=list(DAMAGE))
def test_a_damaged_newest_checkpoint_is_named_and_left_alone(run, damage, name):
    damage(run / "checkpoints" / "step-0000020" / name)
    with pytest.raises(IntegrityError, match="step-0000020") as caught:
        find_checkpoint(run)
    assert "step-0000015" in caught.value.hint
    assert "--resume last-good" in caught.value.hint
    folder, manifest = find_checkpoint(run, "last-good")
    assert (folder.name, manifest.info["step"]) == ("step-0000015", 15)
    assert (run / "checkpoints" / "damaged-step-0000020").is_dir()
    assert find_checkpoint(run)[0] == folder


def test_going_back_trains_the_lost_steps_again(run):
    wanted = (run / "checkpoints" / "step-0000020" / "toy.safetensors").read_bytes()
    DAMAGE["flipped"](run / "checkpoints" / "step-0000020" / "ema.safetensors")
    assert train_toy(run, resume="last-good").step == 20
    assert (run / "checkpoints" / "step-0000020" / "toy.safetensors").read_bytes() == wanted


def test_no_whole_checkpoint_at_all_is_said(run):
    for folder in list_checkpoints(run):
        (folder / "manifest.json").unlink()
    for resume in ("auto", "last-good"):
        with pytest.raises(IntegrityError, match=r"damaged|whole"):
            find_checkpoint(run, resume)


def test_a_run_whose_checkpoints_are_gone_is_not_trained_from_the_start(run):
    shutil.rmtree(run / "checkpoints")
    log = (run / "metrics.jsonl").read_bytes()
    with pytest.raises(IntegrityError, match="checkpoints/ are gone"):
        train_toy(run)
    assert (run / "metrics.jsonl").read_bytes() == log
    (run / "latest.json").unlink()
    train_toy(run)


def test_a_write_that_fails_leaves_the_old_ones(run, monkeypatch):
    calls = []

    def fail_at_second(path, tensors, metadata=None):
        calls.append(path)
        if len(calls) == 2:
            raise ArtifactError("disk full")
        path.write_bytes(b"half")

    monkeypatch.setattr("varcli.training.checkpoint.write_tensors", fail_at_second)
    with pytest.raises(ArtifactError, match="disk full"):
        save_checkpoint(run, 25, ToyTrainer(20).parts, {})
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-0000015", "step-0000020"]
    assert find_checkpoint(run)[1].info["step"] == 20


def test_a_checkpoint_of_another_model_is_refused_by_its_first_difference(run):
    folder, manifest = find_checkpoint(run)
    with pytest.raises(ArtifactError, match=r"0\.weight"):
        load_checkpoint(folder, manifest, ToyTrainer(20, width=4).parts)


def test_optimizer_state_of_other_parameters_is_refused(run):
    folder, manifest = find_checkpoint(run)
    model = ToyTrainer(20).model
    fewer = torch.optim.AdamW(model[0].parameters(), fused=True)
    with pytest.raises(ArtifactError, match=r"unknown parameter `toy\.2\.bias`"):
        load_checkpoint(folder, manifest, Parts(modules={"toy": model}, optimizers={"toy": fewer}))


def test_an_unknown_way_to_resume_is_refused(run):
    with pytest.raises(ConfigError, match="resume mode"):
        find_checkpoint(run, "newest")


def test_random_state_comes_back():
    import random

    import numpy as np

    cpu = torch.device("cpu")
    draw = lambda: (random.random(), np.random.rand(), torch.rand(()).item())  # noqa: E731
    state = capture_random(cpu)
    first = draw()
    restore_random(state, cpu)
    assert draw() == first
    state = capture_random(cpu)
    with undisturbed(cpu):
        draw()
    assert all(torch.equal(state[name], tensor) for name, tensor in capture_random(cpu).items())


def test_a_generator_of_another_device_starts_a_sequence_that_the_checkpoint_decides(tmp_path):
    trainer = ToyTrainer(steps=4)
    files = trainer.parts.tensors()
    state = files["random"].pop("generator/noise/cpu")
    files["random"]["generator/noise/cuda"] = state[:16]

    def draw() -> float:
        trainer.parts.load(files, tmp_path)
        return torch.rand((), generator=trainer.generator).item()

    assert draw() == draw()
    del files["random"]["generator/noise/cuda"]
    with pytest.raises(ArtifactError, match="noise"):
        draw()


def test_another_process_waits_until_it_sees_the_first_ones_checkpoint(run):
    """Law: whatever this host still sees of a shared folder, all go on from the same bytes."""
    folder, manifest = find_checkpoint(run)
    hidden = folder.rename(folder.with_name("on-its-way"))
    timer = threading.Timer(0.5, lambda: hidden.rename(folder))
    timer.start()
    assert await_checkpoint(folder, manifest.digest, seconds=30) == (folder, manifest)
    timer.join()
    before = find_checkpoint(run)[0].with_name("step-0000015")
    with pytest.raises(ArtifactError, match="does not see it: what is there is another checkpoint"):
        await_checkpoint(before, manifest.digest, seconds=0.1)
    with pytest.raises(ArtifactError, match=r"does not see it: .*on-its-way"):
        await_checkpoint(hidden, manifest.digest, seconds=0.1)


@pytest.mark.parametrize("is_cut", [False, True])
def test_another_process_waits_for_a_file_that_arrives_after_the_manifest(run, is_cut):
    folder, manifest = find_checkpoint(run)
    name = max(manifest.files, key=lambda name: manifest.files[name].size)
    hidden = (folder / name).rename(run / "on-its-way")
    if is_cut:
        (folder / name).write_bytes(hidden.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match=f"does not see it: .*{name}"):
        await_checkpoint(folder, manifest.digest, seconds=0.1)
    timer = threading.Timer(0.5, lambda: hidden.replace(folder / name))
    timer.start()
    assert await_checkpoint(folder, manifest.digest, seconds=30) == (folder, manifest)
    assert not hidden.exists()
    timer.join()


def test_what_the_first_process_tells_is_what_the_others_go_on_from(run):
    with open_run(run) as first:
        other = RunFolder(run, "auto", World(1, 2), told=first.tell())
        assert (other.stored, other.checkpoint, other.step) == (first.stored, first.checkpoint, 20)
    with open_run(run.with_name("new")) as first:
        other = RunFolder(first.path, "auto", World(1, 2), told=first.tell())
        assert other.stored is other.checkpoint is None
