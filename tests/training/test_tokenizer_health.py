"""A codebook that dies is told once, with what to change; a run that has just begun is not suspected."""

from __future__ import annotations

import pytest
from toy_trainer import ToyTrainer, train_toy

from varcli.config import parse_assignments, replace
from varcli.tokenizer import TokenizerConfig
from varcli.training.runlog import read_log
from varcli.training.tokenizer_health import advise, collapse_warnings
from varcli.training.tokenizer_settings import TokenizerTrainConfig

CONFIG = TokenizerTrainConfig(
    tokenizer=TokenizerConfig(patch_nums=(1, 2, 8), width=32, vocab_size=64), steps=10_000, restart_every=100
).at_side(64)
DEAD = {"images": 1000, "codebook_used": 0.1, "perplexity_scale_0": 1.0, "perplexity_scale_1": 20.0}
DEAD |= {"perplexity_scale_2": 1.5}


def test_collapsed_scales_and_a_dying_codebook_are_named_with_what_to_change():
    found = collapse_warnings(CONFIG, 5000, DEAD)
    assert list(found) == ["scale 0", "scale 2", "codebook"]
    for name in ("restart_every", "quantizer_weight", "learning_rate", "scale_dropout"):
        assert f"--set {name}=" in found["scale 0"]


@pytest.mark.parametrize("steps, step", [(10_000, 999), (1000, 499), (40, 40)])
def test_the_first_validations_and_short_runs_are_not_judged(steps, step):
    config = replace(CONFIG, {"steps": steps})
    assert collapse_warnings(config, step, DEAD) == {}


def test_a_healthy_codebook_is_left_in_peace():
    alive = {**DEAD, "codebook_used": 0.97, "perplexity_scale_0": 9.0, "perplexity_scale_2": 50.0}
    assert collapse_warnings(CONFIG, 5000, alive) == {}


@pytest.mark.parametrize("changes", [{}, {"restart_every": 0}, {"quantizer_weight": 0.0}, {"scale_dropout": 1.0}])
def test_the_advice_is_settings_that_work_and_differ_from_those_there_are(changes):
    config = replace(CONFIG, changes)
    pairs = [part.split("--set ")[1] for part in advise(config).split(": ")[1].split(", ")]
    for name, value in parse_assignments(pairs).items():
        assert getattr(replace(config, {name: value}), name) != getattr(config, name)


def test_a_fault_is_told_once_a_run_and_stands_in_the_log(tmp_path):
    def train(steps: int) -> list[str]:
        trainer, told = ToyTrainer(20), []
        trainer.find_faults = lambda step, values: {"scale 0": f"dead at {step}"} if step > 3 else {}
        train_toy(tmp_path / "run", steps, trainer=trainer, validate_every=2, on_step=told.append)
        return [step.message for step in told if "warning" in (step.message or "")]

    assert train(8) == ["warning: dead at 4"]
    assert train(12) == []  # resumed: it was told before
    events = read_log(tmp_path / "run", "event")
    assert [(event["step"], event["about"], event["message"]) for event in events] == [(4, "scale 0", "dead at 4")]
