"""The trainer of a tokenizer itself: what follows a restart of codes, and whose weights are measured and published."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small_tokenizer import SMALL

from varcli.data.samples import make_grid
from varcli.distributed import World
from varcli.tokenizer.judge import evaluate_tokenizer, scale_strip
from varcli.tokenizer.store import load_tokenizer
from varcli.training import tokenizer_trainer
from varcli.training.pixels import Pixels
from varcli.training.tokenizer_settings import TokenizerTrainConfig
from varcli.training.tokenizer_trainer import TokenizerTrainer

CPU = torch.device("cpu")


def build(**changes) -> TokenizerTrainer:
    values = {"steps": 10, "batch_size": 4, "learning_rate": 2e-3, "warmup_steps": 0, "perceptual_weight": 0.0}
    config = TokenizerTrainConfig(
        **{"tokenizer": SMALL, "restart_every": 0, "adversarial_start": 1.0, **values, **changes}
    )
    images = torch.randint(0, 256, (12, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return TokenizerTrainer(config, Pixels(images[:8]), images[8:], CPU)


def test_a_restarted_code_starts_afresh_everywhere(monkeypatch):
    trainer, moved = build(restart_every=2), []
    right = tokenizer_trainer.restart_dead_codes
    monkeypatch.setattr(tokenizer_trainer, "restart_dead_codes", lambda *a: moved.append(right(*a)) or moved[-1])
    trainer.train_step(0)
    quantizer, table = trainer.model.quantizer, trainer.model.quantizer.codebook.weight
    quantizer.usage_KV.zero_()  # nobody has picked any code
    trainer.train_step(1)
    (rows,) = moved
    assert 0 < len(rows) < len(table)
    assert torch.equal(trainer.average.shadow["quantizer.codebook.weight"][rows], table[rows])
    moments = [value for value in trainer.updater.optimizer.state[table].values() if value.shape == table.shape]
    kept = torch.ones(len(table), dtype=torch.bool)
    kept[rows] = False
    assert len(moments) == 2
    for moment in moments:
        assert not moment[rows].any() and moment[kept].any()
    fair_share = 4 * SMALL.scales.seq_len / SMALL.vocab_size
    assert quantizer.usage_KV[:, rows].sum(dim=0) == pytest.approx(fair_share * np.ones(len(rows)))


def test_only_the_process_that_measures_decodes_images_to_measure_on():
    class Spread(Pixels):
        def spread(self, count):
            asked.append(count)
            return super().spread(count)

    images = torch.zeros(8, 3, 32, 32, dtype=torch.uint8)
    config = TokenizerTrainConfig(tokenizer=SMALL, batch_size=4, learning_rate=1e-3, perceptual_weight=0.0)
    for rank, expected in ((0, 8), (1, 0)):
        asked = []
        trainer = TokenizerTrainer(config, Spread(images), images[:0], CPU, World(rank, 2))
        assert (len(trainer.measured), len(asked)) == (expected, 1 - rank)


@pytest.mark.parametrize("weight", [0.0, 0.1, 2.0])
def test_training_and_validation_mean_the_same_by_loss(weight):
    unchanged = {"learning_rate": 1e-12, "scale_dropout": 0.0, "shift": 0, "flip": False, "batch_size": 8}
    trainer = build(perceptual_weight=weight, ema_decay=0.0, **unchanged)
    with torch.no_grad():
        trainer.model.decoder.conv_out.weight.mul_(0.1)  # so that no pixel is cut off
    trainer.measured = trainer.images.spread(8)
    found, expected = trainer.train_step(0), trainer.validate()
    assert found["loss"].item() == pytest.approx(expected["loss"], rel=1e-4)


class Broken(torch.autograd.Function):
    """Passes on what it gets, and fails on the way back."""

    @staticmethod
    def forward(context, x):
        return x.clone()

    @staticmethod
    def backward(context, gradient):
        raise RuntimeError("no compiler for the way back\nmore")


class Stands(torch.nn.Module):
    """Stands for a compiled module: calls a function in its place."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs):
        return self.function(*inputs)


def break_compiled(trainer: TokenizerTrainer, part: str) -> None:
    """Make the trainer believe that torch.compile made its networks, one of which does not work."""
    objective = trainer.objective

    def fail(*_):
        raise RuntimeError("no compiler here\nmore")

    def fail_on_the_way_back(*inputs):
        reconstructions, loss, codes = objective.tokenizer(*inputs)
        return Broken.apply(reconstructions), loss, codes

    works = {"tokenizer": fail, "backward": fail_on_the_way_back}.get(
        part, lambda *inputs: objective.tokenizer(*inputs)
    )
    objective.run_tokenizer = Stands(works)
    objective.run_perceptual = Stands(fail) if part == "perceptual" else objective.perceptual


@pytest.mark.parametrize("part", ["tokenizer", "perceptual", "backward"])
def test_what_cannot_be_compiled_is_told_before_the_run_and_changes_no_number(part):
    plain, trainer, told = build(perceptual_weight=0.1), build(perceptual_weight=0.1), []
    plain.prepare(told.append)
    break_compiled(trainer, part)
    trainer.prepare(told.append)
    assert len(told) == 1 and told[0].startswith("going without torch.compile: no compiler") and "more" not in told[0]
    assert not trainer.objective.is_compiled
    for step in range(2):
        expected, found = plain.train_step(step), trainer.train_step(step)
        assert torch.equal(found["loss"], expected["loss"]) and torch.equal(
            found["perceptual_loss"], expected["perceptual_loss"]
        )


def test_a_compiler_that_was_asked_for_must_work(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda module, **_: module)
    trainer = build(compile=True)
    break_compiled(trainer, "tokenizer")
    with pytest.raises(RuntimeError, match="no compiler here"):
        trainer.prepare(lambda text: None)


def test_the_averaged_weights_are_measured_drawn_and_published(tmp_path):
    trainer = build(ema_decay=0.9)
    for step in range(4):
        trainer.train_step(step)
    trainer.publish(tmp_path / "tokenizer", {})
    published = load_tokenizer(tmp_path / "tokenizer")
    average, own = trainer.average.tensors(), dict(trainer.model.named_parameters())
    for name, parameter in published.named_parameters():
        assert torch.equal(parameter, average[name])
    assert not torch.equal(average["quantizer.codebook.weight"], own["quantizer.codebook.weight"])
    found, expected = trainer.validate(), evaluate_tokenizer(published, trainer.held_out, None)
    assert {name: found[name] for name in expected} == expected
    assert evaluate_tokenizer(trainer.model.eval(), trainer.held_out, None)["psnr"] != expected["psnr"]
    strip = scale_strip(published, trainer.held_out)
    drawn = make_grid(strip.flatten(0, 1), columns=strip.shape[1])
    assert trainer.draw(4).tobytes() == drawn.tobytes()
