"""`varcli train-tokenizer` and `varcli curves`: the result, the picture of its curves, and making that again."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from varcli.cli.app import app
from varcli.errors import ArtifactError
from varcli.report.curves import CURVES_NAME

runner = CliRunner()
TINY = ["patch_nums=[1,2,4]", "vocab_size=16", "code_channels=8", "width=16", "channel_multipliers=[1,1,1,1]"]
TINY += ["num_res_blocks=1", "norm_groups=4"]
QUICK = ["--steps", "4", "--batch-size", "4", "--device", "cpu", "--json"]
SETTINGS = [f"tokenizer.{setting}" for setting in TINY] + ["perceptual_weight=0", "validate_every=2", "log_every=1"]


def train(images, out, *settings: str):
    given = [part for setting in (*SETTINGS, *settings) for part in ("--set", setting)]
    return runner.invoke(app, ["train-tokenizer", str(images), "--out", str(out), *QUICK, *given])


def test_a_run_ends_with_its_curves_which_the_log_alone_gives_again(tiny_images, tmp_path):
    run = tmp_path / "run"
    result = train(tiny_images, run)
    assert result.exit_code == 0, result.stderr
    value = json.loads(result.stdout)
    assert value["curves"] == str(run / CURVES_NAME)
    drawn = (run / CURVES_NAME).read_bytes()
    again = runner.invoke(app, ["curves", str(run), "--out", str(tmp_path / "again.png"), "--json"])
    assert json.loads(again.stdout) == {"curves": str(tmp_path / "again.png")}
    assert (tmp_path / "again.png").read_bytes() == drawn


def test_curves_that_cannot_be_drawn_do_not_cost_the_run(tiny_images, tmp_path, monkeypatch):
    def fail(path, image):
        raise ArtifactError("the disk is full")

    monkeypatch.setattr("varcli.report.curves.save_png", fail)
    result = train(tiny_images, tmp_path / "run")
    assert result.exit_code == 0, result.stderr
    assert "no curves: the disk is full" in result.stderr
    assert json.loads(result.stdout)["steps"] == 4


@pytest.mark.parametrize("where", ["gone", "."])
def test_curves_of_what_is_no_run_are_refused(where, tmp_path):
    result = runner.invoke(app, ["curves", str(tmp_path / where)])
    assert result.exit_code == 1 and "metrics.jsonl" in result.stderr
