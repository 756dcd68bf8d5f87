"""Several averages at once: each is what it would be alone, all resume exactly, and the best may be the one that counts."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from toy_runs import TINY, StopAfter, losses, train

from varcli import config as configs
from varcli.artifacts.verify import read_manifest, read_tensors
from varcli.errors import ConfigError, InterruptedRun
from varcli.training import TrainConfig
from varcli.training.ema import Averages
from varcli.training.runlog import read_log
from varcli.training.settings import resolve
from varcli.training.transformer_trainer import TransformerTrainer

SEVERAL = replace(TINY, ema_decays=(0.5, 0.1))


def test_each_average_is_what_it_would_be_alone_and_training_is_the_same(tmp_path, codes, tokenizer_folder):
    train(codes, tmp_path / "several", tokenizer_folder, SEVERAL)
    found = read_tensors(tmp_path / "several" / "checkpoints" / "step-0000012" / "ema.safetensors")
    validated = read_log(tmp_path / "several", "validation")
    for decay, name in ((0.9, "transformer"), (0.5, "transformer-0.5"), (0.1, "transformer-0.1")):
        alone = tmp_path / f"alone-{decay}"
        train(codes, alone, tokenizer_folder, replace(TINY, ema_decay=decay))
        assert losses(alone) == losses(tmp_path / "several")
        for key, tensor in read_tensors(alone / "checkpoints" / "step-0000012" / "ema.safetensors").items():
            assert torch.equal(tensor, found[key.replace("transformer/", f"{name}/", 1)]), key
        assert [line["loss"] for line in read_log(alone, "validation")] == [
            line[f"loss_ema_{decay}"] for line in validated
        ]
    assert [line["loss"] for line in validated] == [line["loss_ema_0.9"] for line in validated]
    published = read_tensors(tmp_path / "several" / "transformer" / "weights.safetensors")
    assert torch.equal(published["positions"], found["transformer/positions"])
    assert read_manifest(tmp_path / "several" / "transformer", "transformer").info["ema_decay"] == 0.9


@pytest.mark.parametrize("stop", [6, 9])
def test_the_best_counts_and_resuming_equals_never_stopping(tmp_path, codes, tokenizer_folder, stop):
    config = replace(SEVERAL, best_average=True)
    train(codes, tmp_path / "whole", tokenizer_folder, config)
    with pytest.raises(InterruptedRun):
        train(codes, tmp_path / "cut", tokenizer_folder, config, on_step=StopAfter(stop))
    train(codes, tmp_path / "cut", tokenizer_folder, config)
    last = read_log(tmp_path / "whole", "validation")[-1]
    assert last["loss"] == min(last[f"loss_ema_{decay}"] for decay in (0.9, 0.5, 0.1)) < last["loss_ema_0.9"]
    assert read_log(tmp_path / "cut", "validation")[-1] == last
    chosen = read_manifest(tmp_path / "whole" / "transformer", "transformer").info["ema_decay"]
    assert last[f"loss_ema_{chosen}"] == last["loss"]
    parts = [f"checkpoints/step-0000012/{name}.safetensors" for name in ("ema", "optimizer", "transformer")]
    for path in (*parts, "transformer/weights.safetensors"):
        assert (tmp_path / "whole" / path).read_bytes() == (tmp_path / "cut" / path).read_bytes(), path


@pytest.mark.parametrize("stop", [6, 10])  # a step after a validation, and at one
def test_which_was_best_is_known_after_a_stop(tmp_path, codes, tokenizer_folder, stop):
    config, reports = replace(SEVERAL, best_average=True, validate_every=5, save_every=5), []
    with pytest.raises(InterruptedRun):
        train(codes, tmp_path / "run", tokenizer_folder, config, on_step=StopAfter(stop))
    train(codes, tmp_path / "run", tokenizer_folder, replace(config, steps=stop), on_step=reports.append)
    checkpoint = read_manifest(tmp_path / "run" / "checkpoints" / f"step-{stop:07d}", "checkpoint")
    validated = read_log(tmp_path / "run", "validation")[-1]
    known = checkpoint.info["remembered"]["average_losses"]
    assert known == [validated[f"loss_ema_{decay}"] for decay in (0.9, 0.5, 0.1)]
    chosen = read_manifest(tmp_path / "run" / "transformer", "transformer").info["ema_decay"]
    assert validated[f"loss_ema_{chosen}"] == min(known)


def test_the_first_counts_until_something_was_measured():
    averages = Averages(nn.Linear(2, 2), (0.9, 0.5, 0.1), take_best=True)
    assert averages.average is averages.members[0]
    averages.losses.copy_(torch.tensor([2.0, float("nan"), 1.0]))
    assert averages.average is averages.members[2]
    averages.take_best = False
    assert averages.average is averages.members[0]
    assert Averages(nn.Linear(2, 2), ()).average is None


@pytest.mark.parametrize(
    "losses", [(2.0, float("nan"), 1.0), (float("inf"), float("nan"), 3.0), (float("nan"), float("inf"))]
)
def test_what_is_remembered_of_losses_that_are_no_numbers_chooses_the_same(losses):
    decays = (0.9, 0.5, 0.1)[: len(losses)]
    before, after = (Averages(nn.Linear(2, 2), decays, take_best=True) for _ in range(2))
    before.losses.copy_(torch.tensor(losses))
    stored = json.dumps(TransformerTrainer.remember(SimpleNamespace(averages=before)), allow_nan=False)
    TransformerTrainer.recall(SimpleNamespace(averages=after), json.loads(stored))
    assert after.chosen == before.chosen


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"ema_decays": (1.0,)}, "at most 0.999999"),
        ({"ema_decay": 0.0, "ema_decays": (0.9,)}, "ema_decay is 0"),
        ({"ema_decay": 0.9, "ema_decays": (0.9,)}, "a decay twice"),
        ({"ema_decay": 0.9, "best_average": True}, "there is one average"),
        ({"ema_decay": 0.9, "ema_decays": (0.5,), "best_average": True, "validate_every": 0}, "no validation"),
    ],
)
def test_averages_that_make_no_sense_are_refused(values, text):
    facts = {"num_images": 50, "has_validation": True, "device_type": "cpu", "precision": "fp32"}
    with pytest.raises(ConfigError, match=text):
        resolve(TrainConfig(**values), **facts)


@pytest.mark.parametrize("value", ["0.99,0.9999", [0.99, 0.9999], "0.99 , 0.9999"])
def test_decays_are_read_from_texts_and_lists(value):
    assert configs.from_dict(TrainConfig, {"ema_decays": value}).ema_decays == (0.99, 0.9999)
    assert configs.from_dict(TrainConfig, {"ema_decays": 0.5}).ema_decays == (0.5,)
    with pytest.raises(ConfigError, match="ema_decays"):
        configs.from_dict(TrainConfig, {"ema_decays": "0.9,fast"})
