"""`varcli train`: the plan, the result, going on, and what bad input gets."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from toy_codes import write_codes
from typer.testing import CliRunner

from varcli.cli.app import app
from varcli.tokenizer.store import save_tokenizer

runner = CliRunner()
QUICK = ["--batch-size", "8", "--device", "cpu", "--set", "width=32", "--set", "num_heads=2", "--set", "sample_every=0"]


@pytest.fixture
def place(tmp_path: Path, tiny_tokenizer, monkeypatch) -> Path:
    """A working folder with codes/ and, in models/tiny, the tokenizer that wrote them."""
    monkeypatch.chdir(tmp_path)
    save_tokenizer(tmp_path / "models" / "tiny", tiny_tokenizer)
    write_codes(tmp_path / "codes", tiny_tokenizer, torch.Generator().manual_seed(0))
    return tmp_path


def train(*arguments: str):
    return runner.invoke(app, ["train", *QUICK, *arguments])


def test_a_run_is_planned_trained_and_reported(place):
    result = train("--depth", "2", "--steps", "6", "--json")
    assert result.exit_code == 0, result.stderr
    for text in ("depth 2, width 32", "40 images x 2 views in 3 classes, 12 held out", "6 steps of 8 images", "cpu"):
        assert text in result.stderr
    assert result.stderr.count("training: 6/6 steps") == 1  # not again with what the validation came to
    value = json.loads(result.stdout)
    assert (value["folder"], value["steps"]) == ("runs/d2", 6)
    assert value["validation"]["loss"] == value["best"]["loss"]
    assert (place / "runs" / "d2" / "transformer" / "manifest.json").is_file()


def test_pictures_are_drawn_on_the_way_and_at_the_end(place):
    result = train("--depth", "2", "--steps", "5", "--set", "sample_every=2")
    assert result.exit_code == 0, result.stderr
    drawn = sorted(path.name for path in (place / "runs" / "d2" / "samples").iterdir())
    assert drawn == ["step-0000002.png", "step-0000004.png", "step-0000005.png"]


def test_run_again_it_goes_on_with_its_own_settings(place):
    assert train("codes", "--depth", "2", "--steps", "4", "--lr", "1e-3", "--name", "first").exit_code == 0
    bare = ["train", "--name", "first", "--device", "cpu"]
    done = runner.invoke(app, bare)
    assert done.exit_code == 0, done.stderr
    assert "has all its 4 steps already" in done.stderr
    longer = runner.invoke(app, [*bare, "--steps", "7"])
    assert longer.exit_code == 0, longer.stderr
    assert "going on from step 4" in longer.stderr
    assert "varcli sample --model runs/first" in longer.stderr
    config = json.loads((place / "runs" / "first" / "config.json").read_text())["config"]
    assert (config["depth"], config["width"], config["steps"], config["learning_rate"]) == (2, 32, 7, 1e-3)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--depth", "3", "--name", "first"], 1, "depth was 2, now 3"),
        (["--set", "label_dropout=0.2", "--name", "first"], 1, "label_dropout was 0.1, now 0.2"),
        (["--set", "optimizer=muon", "--lr", "1", "--name", "first"], 1, "optimizer was adamw, now muon"),
        (["--name", "first", "--resume", "never"], 1, "holds a run already"),
        (["--name", "first", "--resume", "newest"], 1, "unknown resume mode"),
        (["--name", "first", "--out", "runs/other"], 1, "both say where"),
        (["--set", "lerning_rate=1"], 1, "learning_rate"),
        (["--config", "misspelt.toml"], 1, "weight_decay"),
        (["--set", "optimizer=moun"], 1, "muon"),
        (["--set", "learning_rate=fast"], 1, "takes a number, but got 'fast'"),
        (["--steps", "0"], 1, "steps must be at least 1"),
        (["--precision", "fp8"], 1, "unknown precision"),
        (["--fp8"], 1, "fp8 needs an NVIDIA GPU"),
        (["--config", "none.toml"], 1, "cannot read config"),
        (["nothing"], 1, "varcli tokenize IMAGES"),
        (["--set", "mlp_ratio=nan"], 1, "takes a number"),
        (["--set", "weight_decay=-1"], 1, "weight_decay must be"),
        (["--set", "seed=-1"], 1, "seed must be"),
        (["--epochs", "0"], 1, "epochs must be above 0"),
        (["--epochs", "inf"], 1, "takes a number"),
        (["--epochs", "1", "--steps", "2"], 1, "both say how long"),
        (["--depth", "1", "--set", "depth=2"], 1, "give one of them"),
        (["--name", "../evil"], 1, "use --out"),
        (["--name", ""], 1, "use --out"),
        (["--seed", "-1"], 1, "--seed"),
        (["models/tiny"], 1, "is a tokenizer folder, but a codes folder is needed"),
        (["--tokenizer", "codes"], 1, "holds no tokenizer"),
        (["--out", "codes"], 1, "holds no run"),
        (["--depth", "two"], 2, "depth"),
    ],
)
def test_bad_input_gets_one_clear_error(place, arguments, code, words):
    (place / "misspelt.toml").write_text("wieght_decay = 0.1\n")
    if "first" in arguments:
        assert train("--depth", "2", "--steps", "2", "--name", "first").exit_code == 0
    result = train(*arguments)
    assert result.exit_code == code, result.stderr
    assert words in result.stderr
    assert "Traceback" not in result.stderr


def test_a_refused_run_leaves_nothing_and_the_corrected_one_runs(place):
    refused = train("--depth", "2", "--steps", "2", "--name", "first", "--set", "num_heads=7")
    assert refused.exit_code == 1 and not (place / "runs" / "first").exists()
    corrected = train("--depth", "2", "--steps", "2", "--name", "first")
    assert corrected.exit_code == 0, corrected.stderr


def test_what_another_run_would_take_is_not_foretold_and_other_steps_are_told(place):
    assert train("--depth", "2", "--steps", "2", "--name", "first").exit_code == 0
    refused = train("--depth", "3", "--steps", "2", "--name", "first")
    assert refused.exit_code == 1 and "depth was 2, now 3" in refused.stderr and "parameters" not in refused.stderr
    longer = train("--depth", "2", "--steps", "3", "--name", "first")
    assert longer.exit_code == 0 and "going on from step 2 of 3, begun for 2" in longer.stderr


def test_a_batch_larger_than_the_data_is_told(place):
    result = train("--depth", "1", "--steps", "1", "--batch-size", "80")  # of 40 images
    assert result.exit_code == 0 and "each step takes an image 2 times" in result.stderr


def test_a_missing_gpu_is_said(place):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    result = runner.invoke(app, ["train", "--device", "cuda"])
    assert result.exit_code == 1
    assert "no CUDA GPU" in result.stderr


def test_a_damaged_checkpoint_names_the_way_back(place):
    assert train("--depth", "2", "--steps", "4", "--set", "save_every=2").exit_code == 0
    path = place / "runs" / "d2" / "checkpoints" / "step-0000004" / "transformer.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    result = train("--depth", "2", "--steps", "6")
    assert result.exit_code == 3
    assert "step-0000004" in result.stderr
    assert "step-0000002" in result.stderr
    result = train("--depth", "2", "--steps", "6", "--resume", "last-good")
    assert result.exit_code == 0, result.stderr
    assert "going on from step 2" in result.stderr


def test_a_config_file_gives_way_to_options(place):
    (place / "small.toml").write_text("depth = 2\nsteps = 3\nlearning_rate = 1e-3\n")
    result = train("--config", "small.toml", "--steps", "2", "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["folder"] == "runs/d2"
    assert json.loads(result.stdout)["steps"] == 2


def test_a_terminated_run_exits_with_75_and_goes_on(place):
    options = [
        "--depth",
        "2",
        "--steps",
        "100000",
        *QUICK,
        "--set",
        "log_every=1",
        "--set",
        "validate_every=0",
        "--set",
        "warmup_steps=0",
    ]
    command = [sys.executable, "-m", "varcli", "train", *options]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, env=environment, text=True)
    log = place / "runs" / "d2" / "metrics.jsonl"
    while process.poll() is None and not (log.is_file() and log.read_text()):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 75, stderr
    assert "the state is saved" in stderr
    step = json.loads((place / "runs" / "d2" / "latest.json").read_text())["checkpoint"]
    result = train("--depth", "2", "--steps", str(int(step.removeprefix("step-")) + 2))
    assert result.exit_code == 0, result.stderr


def test_a_run_is_fine_tuned_by_name_and_goes_on(place):
    assert train("--depth", "2", "--steps", "2", "--name", "first").exit_code == 0
    options = [
        "train",
        "--batch-size",
        "8",
        "--device",
        "cpu",
        "--set",
        "sample_every=0",
        "--set",
        "frozen=blocks:1-1,head",
    ]
    started = runner.invoke(app, [*options, "--steps", "2", "--init-from", "first", "--lr", "1e-3"])
    assert started.exit_code == 0, started.stderr
    assert "starts from runs/first/transformer, which knows 3 of the 3 classes" in started.stderr
    assert "stay as they are: blocks:1-1, head" in started.stderr
    config = json.loads((place / "runs" / "first-tuned" / "config.json").read_text())["config"]
    assert (config["depth"], config["width"], config["frozen"]) == (2, 32, ["blocks:1-1", "head"])
    again = runner.invoke(app, [*options, "--steps", "3", "--init-from", "first"])
    assert again.exit_code == 0 and "going on from step 2" in again.stderr, again.stderr
    refused = runner.invoke(app, [*options, "--init-from", "frist"])
    assert refused.exit_code == 1 and "unknown transformer `frist`" in refused.stderr
