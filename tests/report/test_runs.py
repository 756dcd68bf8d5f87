"""Summaries say what logs and folders hold; comparisons name what differs and nothing else."""

from __future__ import annotations

import json
import os

import pytest
from run_folders import write_run

from varcli.data.runs import read_run
from varcli.errors import ArtifactError, ConfigError
from varcli.report.runs import differences, final_numbers, list_runs, read_runs, summarize


def test_a_summary_holds_the_last_and_the_best_numbers(tmp_path):
    records = [
        {"kind": "train", "step": 10, "loss": 5.0, "images_per_second": 10.0, "seconds": 1.0},
        {"kind": "validation", "step": 10, "loss": 4.5},
        {"kind": "train", "step": 20, "loss": 4.0, "images_per_second": 30.0, "seconds": 2.0},
        {"kind": "validation", "step": 20, "loss": 4.75},
        {"kind": "train", "step": 30, "loss": "nan", "images_per_second": 20.0, "seconds": 3.5},
    ]
    found = summarize(read_run(write_run(tmp_path / "a", records=records)))
    assert (found.step, found.steps, found.state) == (30, 100, "stopped")
    assert (found.loss, found.best_loss, found.best_step) == (4.0, 4.5, 10)
    assert (found.images_per_second, found.seconds) == (20.0, 3.5)
    assert (found.depth, found.width) == (4, 256)


def test_a_run_without_a_log_is_one_line_too(tmp_path):
    folder = write_run(tmp_path / "a", records=[], tokenizer={"width": 64}, kind="tokenizer", depth=None)
    found = summarize(read_run(folder))
    assert (found.step, found.loss, found.best_loss, found.images_per_second) == (0, None, None, None)
    assert (found.depth, found.width, found.parameters) == (None, 64, None)
    (folder / "latest.json").write_text(json.dumps({"checkpoint": "step-0000070"}))
    assert summarize(read_run(folder)).step == 70
    (folder / "latest.json").write_text("7")
    assert summarize(read_run(folder)).step == 0


def test_the_newest_log_comes_first_and_damage_stops_nothing(tmp_path):
    for age, name in enumerate(("new", "older", "oldest")):
        path = write_run(tmp_path / name) / "metrics.jsonl"
        os.utime(path, (1e9 - age, 1e9 - age))
    (write_run(tmp_path / "bad") / "config.json").write_text("{")
    runs, others = list_runs([tmp_path])
    assert [run.name.rsplit("/", 1)[1] for run in runs] == ["new", "older", "oldest"]
    (what,) = others.values()
    assert "not valid JSON" in what


def test_a_run_named_in_two_ways_is_listed_once(tmp_path):
    write_run(tmp_path / "a")
    assert len(list_runs([tmp_path, tmp_path / "a"])[0]) == 1


def test_only_settings_that_differ_are_named(tmp_path):
    runs = [
        read_run(write_run(tmp_path / "a", learning_rate=1e-3, tokenizer={"width": 8, "patch_nums": [1, 2]})),
        read_run(write_run(tmp_path / "b", learning_rate=2e-3, tokenizer={"width": 9, "patch_nums": [1, 2]}, extra=1)),
    ]
    assert differences(runs) == {"learning_rate": [1e-3, 2e-3], "tokenizer.width": [8, 9], "extra": [None, 1]}
    assert differences([runs[0], runs[0]]) == {}


def test_runs_of_two_kinds_are_compared_in_what_both_have(tmp_path):
    runs = [
        read_run(write_run(tmp_path / "a", label_dropout=0.1)),
        read_run(write_run(tmp_path / "b", kind="tokenizer")),
    ]
    assert differences(runs) == {"kind": ["transformer", "tokenizer"]}


def test_final_numbers_stand_side_by_side(tmp_path):
    runs = [read_run(write_run(tmp_path / "a")), read_run(write_run(tmp_path / "b", done=20, batch_size=16))]
    numbers = final_numbers(runs)
    assert numbers["steps"] == [100, 20]
    assert numbers["images seen"] == [800, 320]
    assert numbers["hours of training"] == pytest.approx([10 / 3600, 2 / 3600])
    assert numbers["best validation loss"] == [pytest.approx(4.2), None]
    assert numbers["validation accuracy"] == [0.09, None]
    assert "parameters" not in numbers  # neither has any
    last = {
        "kind": "validation",
        "step": 1,
        "loss": 2.0,
        "loss_last": 3.0,
        "loss_by_scale": [1.0],
        "perplexity_scale_0": 4.0,
    }
    numbers = final_numbers([read_run(write_run(tmp_path / "c", records=[last]))])
    assert {name for name in numbers if name.startswith("validation")} == {
        "validation loss",
        "validation loss, finest scale",
    }


def test_what_cannot_be_compared_is_refused(tmp_path):
    folder = write_run(tmp_path / "a")
    with pytest.raises(ConfigError, match="again"):
        read_runs([folder, tmp_path / "." / "a"])
    with pytest.raises(ArtifactError):
        read_runs([folder, tmp_path])
