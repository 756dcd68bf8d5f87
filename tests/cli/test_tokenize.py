"""`varcli tokenize` by itself and under torchrun: one result, and the same cache."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import varcli
from varcli.artifacts.verify import read_manifest
from varcli.cli.app import app
from varcli.tokenizer.store import save_tokenizer


@pytest.fixture
def arguments(tiny_tokenizer, tiny_images, tmp_path) -> list[str]:
    save_tokenizer(tmp_path / "tokenizer", tiny_tokenizer)
    return [
        "tokenize",
        str(tiny_images),
        "--tokenizer",
        str(tmp_path / "tokenizer"),
        "--device",
        "cpu",
        "--json",
        "--out",
    ]


def test_a_faster_precision_prints_its_agreement(arguments, tmp_path):
    result = CliRunner().invoke(app, [*arguments, str(tmp_path / "codes"), "--precision", "fp16", "--workers", "0"])
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert (told["rows"], told["precision"]) == (21, "fp16")
    assert 0.9 < told["agreement"]["tokens"] <= 1 and len(told["agreement"]["by_scale"]) == 3


def test_the_next_command_names_a_tokenizer_that_train_would_not_find(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plain = [word for word in arguments if word != "--json"]
    told = CliRunner().invoke(app, [*plain, "my codes", "--workers", "0"]).stderr.splitlines()[-1]
    assert told == f"next: varcli train 'my codes' --depth 6 --tokenizer {tmp_path / 'tokenizer'}"
    (tmp_path / "tokenizers").mkdir()
    (tmp_path / "tokenizer").rename(tmp_path / "tokenizers" / "mine")
    plain[plain.index("--tokenizer") + 1] = "mine"
    told = CliRunner().invoke(app, [*plain, "my codes", "--workers", "0"]).stderr.splitlines()[-1]
    assert told == "next: varcli train 'my codes' --depth 6"


def test_unknown_words_are_refused(arguments, tmp_path):
    for option in (["--precision", "tf32"], ["--compile", "maybe"], ["--compile", "on"]):
        assert CliRunner().invoke(app, [*arguments, str(tmp_path / "codes"), *option]).exit_code == 1
    assert not (tmp_path / "codes").exists()


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.timeout(240)
def test_torchrun_prints_one_result_and_writes_what_one_process_writes(arguments, tmp_path):
    assert CliRunner().invoke(app, [*arguments, str(tmp_path / "one"), "--workers", "0"]).exit_code == 0
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "varcli"]
    environment = {**os.environ, "PYTHONPATH": str(Path(varcli.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    command = [*start, *arguments, str(tmp_path / "two"), "--workers", "1"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout)["rows"] == 21
    assert read_manifest(tmp_path / "two", "codes").digest == read_manifest(tmp_path / "one", "codes").digest
