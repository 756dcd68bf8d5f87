"""The rate of a run is measured once, on steps alone, and told with what is left and what it costs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from toy_runs import TINY, train

from varcli.training import pace
from varcli.training.pace import Pace

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_it_is_told_once_and_without_pauses(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(pace.time, "monotonic", lambda: clock[0])
    watched, told = Pace(64, 1, CPU, planned=3.0), []
    for done in range(1, 40):
        clock[0] += 100.0 if done < 5 else 2.0  # the first steps compile
        told.append(watched.note(1000 - done))
        if done in (3, 7, 20):
            clock[0] += 50.0
            watched.pause(50.0)
    assert [index for index, text in enumerate(told) if text] == [19]
    assert told[19] == "measured: 32 images/s, 32m40s left (the plan said 49m00s)"


def test_the_cost_is_hours_times_gpus():
    text = Pace(768, 8, CUDA).describe(0.5, 36_000)
    assert text == "measured: 1,536 images/s, 5h00m left, 40 GPU-hours"
    text = Pace(768, 1, CUDA, 1.0, 60 * 2**30).describe(0.5, 3600, 58 * 2**30)
    assert text.endswith("0.5 GPU-hours (the plan said 1h00m), peak 58.0 GiB (60.0)")


@pytest.mark.parametrize(("steps", "count"), [(20, 0), (24, 1)])
def test_a_run_tells_it_unless_it_is_over(tmp_path, codes, tokenizer_folder, steps, count):
    reports = []
    config = replace(TINY, steps=steps, validate_every=7)
    train(codes, tmp_path / "run", tokenizer_folder, config, on_step=reports.append, on_plan=lambda plan: None)
    found = [(step.done, step.message) for step in reports if (step.message or "").startswith("measured")]
    assert [done for done, _ in found] == [20] * count
    assert all("the plan said" in text for _, text in found)
