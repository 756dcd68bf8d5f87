"""Learning rate and weight decay follow the reference, and impossible schedules are refused."""

from __future__ import annotations

import json

import pytest
from golden_files import ROOT

from varcli.errors import ConfigError
from varcli.training.schedules import SHAPES, Schedule

GOLDEN = json.loads((ROOT / "schedules.json").read_text())


@pytest.mark.parametrize("golden", GOLDEN, ids=[f"{entry['sche']}-{entry['max_it']}" for entry in GOLDEN])
def test_schedules_equal_the_reference(golden):
    schedule = Schedule(
        total_steps=golden["max_it"],
        learning_rate=golden["peak_lr"],
        shape=golden["sche"],
        warmup_steps=golden["warmup_it"],
        warmup_start=golden["wp0"],
        final=golden["wpe"],
        weight_decay=golden["wd"],
        final_weight_decay=golden["wd_end"],
    )
    for step, learning_rate, weight_decay in golden["rows_it_lr_wd"]:
        assert schedule.learning_rate_at(step) == pytest.approx(learning_rate, rel=1e-14)
        assert schedule.weight_decay_at(step) == pytest.approx(weight_decay, rel=1e-14)


@pytest.mark.parametrize("shape", [*SHAPES, "lin0.3"])
def test_every_shape_goes_from_the_peak_to_its_final_share(shape):
    schedule = Schedule(total_steps=100, learning_rate=2.0, shape=shape, warmup_steps=10, final=0.25)
    assert schedule.learning_rate_at(10) == pytest.approx(2.0)
    assert schedule.learning_rate_at(99) == pytest.approx(2.0 if shape == "constant" else 0.5)
    rates = [schedule.learning_rate_at(step) for step in range(10, 100)]
    assert rates == sorted(rates, reverse=True)


@pytest.mark.parametrize("total_steps", [1, 2, 3])
def test_the_shortest_runs_have_a_schedule(total_steps):
    schedule = Schedule(total_steps=total_steps, learning_rate=1.0, warmup_steps=total_steps - 1)
    assert all(0 < schedule.learning_rate_at(step) <= 1 for step in range(total_steps))
    assert schedule.weight_decay_at(0) == pytest.approx(0.05)


@pytest.mark.parametrize(
    "changes", [{"shape": "linear"}, {"shape": "lin1.5"}, {"warmup_steps": 11}, {"total_steps": 0}, {"final": 0.0}]
)
def test_impossible_schedules_are_refused(changes):
    with pytest.raises(ConfigError):
        Schedule(**{"total_steps": 10, "learning_rate": 1.0, **changes})
