"""What is left open is chosen by recipe, data and device; what a run was begun with stays."""

from __future__ import annotations

import pytest
import torch

from varcli import config as configs
from varcli.devices import resolve_precision
from varcli.errors import ConfigError
from varcli.scales import NAMED_SCHEDULES, PatchNums
from varcli.training.recipes import PAPER_RECIPES, PRESETS, choose_recipe
from varcli.training.settings import FREE, TrainConfig, resolve
from varcli.transformer import Transformer

IMAGENET = 1_281_167


def resolved(config: TrainConfig | None = None, **changes) -> TrainConfig:
    facts = {"num_images": IMAGENET, "has_validation": True, "device_type": "cuda", "precision": "bf16"}
    return resolve(config or TrainConfig(), **{**facts, **changes})


@pytest.mark.parametrize(
    ("depth", "batch_size", "epochs", "learning_rate", "final", "final_decay", "gates"),
    [
        (16, 768, 200, 3e-4, 0.1, 0.05, 1e-3),
        (20, 768, 250, 3e-4, 0.1, 0.05, 1e-3),
        (24, 768, 350, 2.4e-4, 0.01, 0.05, 1e-4),
        (30, 1024, 350, 3.2e-4, 0.01, 0.08, 1e-5),
        (36, 768, 350, 2.4e-4, 0.01, 0.08, 5e-6),
    ],
)
def test_depth_alone_gives_the_papers_recipe(depth, batch_size, epochs, learning_rate, final, final_decay, gates):
    config = resolved(TrainConfig(depth=depth))
    per_epoch = -(-IMAGENET // batch_size)
    assert (config.batch_size, config.steps) == (batch_size, epochs * per_epoch)
    assert config.warmup_steps == epochs * per_epoch // 50
    assert config.learning_rate == pytest.approx(learning_rate)
    assert (config.final_learning_rate, config.schedule) == (final, "lin0")
    assert (config.weight_decay, config.final_weight_decay) == (0.05, final_decay)
    assert (config.label_dropout, config.label_smoothing, config.grad_clip) == (0.1, 0.0, 2.0)
    assert (config.dropout, config.ema_decay, config.keep_best) == (0.0, 0.0, False)
    model = config.transformer()
    assert (model.width, model.num_heads, model.init_adaln_gamma) == (64 * depth, depth, gates)
    assert model.shared_adaln == (depth == 36)
    assert model.drop_path == pytest.approx(0.1 * depth / 24)


@pytest.mark.parametrize(
    ("depth", "schedule", "num_parameters"),
    [
        (16, "256", 310_283_520),
        (20, "256", 600_917_136),
        (24, "256", 1_033_399_360),
        (30, "256", 2_010_020_356),
        (36, "512", 2_353_893_904),
    ],
)
def test_depth_alone_gives_the_papers_model_at_its_resolution(depth, schedule, num_parameters):
    scales = PatchNums(NAMED_SCHEDULES[schedule])
    data = {"step_lengths": scales.step_lengths, "vocab_size": 4096, "code_channels": 32, "num_classes": 1000}
    with torch.device("meta"):
        model = Transformer(resolved(TrainConfig(depth=depth)).transformer(**data))
    assert model.num_parameters == num_parameters  # as the released models have, the 512 px one with shared modulation


def test_small_depths_take_a_preset_by_device():
    assert choose_recipe(4, "cpu") == PRESETS["laptop"]
    assert choose_recipe(11, "cuda") == PRESETS["one GPU"]
    assert choose_recipe(12, "cpu") == PAPER_RECIPES[16]
    assert choose_recipe(28, "cuda") == PAPER_RECIPES[24]
    with pytest.raises(ConfigError):
        choose_recipe(0, "cpu")


def test_what_is_given_wins_over_the_recipe():
    config = resolved(
        TrainConfig(depth=20, steps=40, batch_size=16, learning_rate=1e-2, weight_decay=0.1, ema_decay=0.9)
    )
    assert (config.steps, config.batch_size, config.learning_rate) == (40, 16, 1e-2)
    assert (config.weight_decay, config.final_weight_decay, config.ema_decay) == (0.1, 0.1, 0.9)
    assert resolved(TrainConfig(epochs=2)).steps == 2 * -(-IMAGENET // 768)


def test_few_images_keep_the_best_weights_if_some_are_held_out():
    assert resolved(num_images=5000).keep_best
    assert not resolved(num_images=5000, has_validation=False).keep_best
    assert resolved(num_images=5000, has_validation=False).validate_every == 0
    assert resolved(TrainConfig(depth=4), num_images=7).batch_size == 7
    with pytest.raises(ConfigError, match="validation split"):
        resolved(TrainConfig(keep_best=True), has_validation=False)


def test_a_resolved_config_is_whole_and_survives_json():
    config = resolved(TrainConfig(depth=6))
    still_open = {name for name, value in configs.to_dict(config).items() if value is None}
    assert still_open <= {"width", "num_heads", "epochs", "micro_batch_size", "drop_path", "compile"}
    assert configs.from_dict(TrainConfig, configs.to_dict(config)) == config
    assert resolved(config) == config


def test_a_resumed_run_keeps_what_it_was_begun_with():
    begun = resolved(TrainConfig(depth=6, learning_rate=1e-2), num_images=5000)
    stored = configs.to_dict(begun)
    again = resolved(TrainConfig(depth=6), num_images=5000, device_type="cpu", precision="fp32", stored=stored)
    assert again == begun
    longer = resolved(TrainConfig(depth=6, steps=50_000), num_images=5000, stored=stored)
    changed = {name for name, value in configs.to_dict(longer).items() if stored[name] != value}
    assert changed == {"steps"} <= FREE
    assert resolved(TrainConfig(depth=6, epochs=40), num_images=5000, stored=stored).steps == 800


@pytest.mark.parametrize(
    "values",
    [
        {"batch_size": 0},
        {"label_dropout": 1.5},
        {"grad_clip": 0.0},
        {"schedule": "linear"},
        {"parallel": "zero"},
        {"precision": "fp8"},
        {"steps": 10, "warmup_steps": 11},
        {"learning_rate": 0.0},
    ],
)
def test_impossible_settings_are_refused(values):
    with pytest.raises(ConfigError):
        config = TrainConfig(**values)
        resolve_precision(config.precision, torch.device("cpu"))
        resolved(config)


def test_a_stored_warm_up_that_is_too_long_is_told_as_such():
    stored = configs.to_dict(resolved(TrainConfig(depth=16)))
    with pytest.raises(ConfigError, match="was begun with a warm-up of"):
        resolved(TrainConfig(depth=16, steps=5), stored=stored)


def test_an_unknown_setting_names_the_nearest():
    with pytest.raises(ConfigError) as caught:
        configs.replace(TrainConfig(), {"lerning_rate": 1.0})
    assert "learning_rate" in caught.value.hint
