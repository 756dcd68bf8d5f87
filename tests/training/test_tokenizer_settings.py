"""Settings of a tokenizer's training: what is refused, by name, and what the images' size chooses."""

from __future__ import annotations

from pathlib import Path

import pytest

from varcli import config as configs
from varcli.errors import ConfigError
from varcli.tokenizer import TokenizerConfig
from varcli.training.tokenizer_settings import TokenizerTrainConfig

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"regularizer": "R1"}, "r1"),
        ({"perceptual": "vgg"}, "lite0, lpips"),
        ({"codebook_init": "kmeans"}, "data"),
        ({"discriminator_augment": ("color",)}, "colour"),
        ({"r1_weight": -1.0}, "0 or more"),
    ],
)
def test_settings_that_cannot_be_are_refused_with_what_there_is(changes, named):
    with pytest.raises(ConfigError) as caught:
        TokenizerTrainConfig(**changes)
    assert named in f"{caught.value} {caught.value.hint}"


@pytest.mark.parametrize(
    "name, values",
    [
        ("steps", (0, -1)),
        ("batch_size", (0, -4)),
        ("learning_rate", (0.0, -1e-4)),
        ("discriminator_learning_rate", (0.0, -1e-4)),
        ("grad_clip", (0.0, -1.0)),
        ("final_learning_rate", (0.0, 1.5)),
        ("warmup_steps", (-1,)),
        ("restart_every", (-3,)),
        ("restart_until", (-0.1, 1.1)),
        ("adversarial_start", (-0.1, 1.1)),
        ("scale_dropout", (-0.1, 1.1)),
        ("ema_decay", (-0.1, 1.0)),
        ("shift", (-1,)),
        ("workers", (-1,)),
        ("max_skip", (-1,)),
        ("quantizer_weight", (-1.0,)),
        ("perceptual_weight", (-1.0,)),
        ("adversarial_weight", (-1.0,)),
        ("lecam_weight", (-1.0,)),
    ],
)
def test_a_number_out_of_its_range_is_refused_by_its_own_name(name, values):
    for value in values:
        with pytest.raises(ConfigError, match=rf"^{name} .*{value:g}"):
            TokenizerTrainConfig(**{name: value})


@pytest.mark.parametrize("side, batch_size, rate", [(32, 192, 5e-4), (64, 192, 5e-4), (128, 64, 1e-4), (256, 16, 1e-4)])
def test_batch_and_learning_rate_follow_the_images_size_where_they_are_open(side, batch_size, rate):
    found = TokenizerTrainConfig().at_side(side)
    assert (found.batch_size, found.learning_rate) == (batch_size, rate)
    given = TokenizerTrainConfig(batch_size=7, learning_rate=1e-2)
    assert given.at_side(side) == given


def test_large_images_have_no_more_pixels_a_batch_than_fit():
    for side in (128, 256, 384, 512, 1024):
        batch_size = TokenizerTrainConfig().at_side(side).batch_size
        assert batch_size == 1 or batch_size * side**2 <= 16 * 256**2


def test_the_defaults_at_64_px_are_the_settings_of_the_tokenizer_that_comes_with_varcli():
    stored = configs.from_dict(TokenizerTrainConfig, configs.read_toml(EXAMPLES / "emoji64_tokenizer.toml"))
    assert stored == TokenizerTrainConfig(tokenizer=TokenizerConfig.for_side(64)).at_side(64)


def test_the_settings_among_the_examples_can_be_read():
    files = sorted(EXAMPLES.glob("*_tokenizer.toml"))
    assert len(files) == 2
    for file in files:
        assert configs.from_dict(TokenizerTrainConfig, configs.read_toml(file)).tokenizer.downsampling in (4, 8)
