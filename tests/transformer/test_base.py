"""Configs of transformers: the paper's sizes by depth, and settings that cannot work."""

from __future__ import annotations

import pytest
import torch

from varcli.errors import ConfigError
from varcli.scales import NAMED_SCHEDULES, PatchNums
from varcli.transformer import Transformer, TransformerConfig

PAPER = {  # depth: schedule, shared AdaLN, parameters of the reference implementation
    12: ("256", False, 133_186_960),
    16: ("256", False, 310_283_520),
    20: ("256", False, 600_917_136),
    24: ("256", False, 1_033_399_360),
    30: ("256", False, 2_010_020_356),
    36: ("512", True, 2_353_893_904),
}


@pytest.mark.parametrize("depth", PAPER)
def test_every_model_of_the_paper_has_its_number_of_parameters(depth):
    schedule, shared, expected = PAPER[depth]
    lengths = PatchNums(NAMED_SCHEDULES[schedule]).step_lengths
    with torch.device("meta"):
        model = Transformer(TransformerConfig.from_depth(depth, step_lengths=lengths, shared_adaln=shared))
    assert model.num_parameters == expected
    assert model.config.width == 64 * depth and model.config.num_heads == depth


def test_the_default_config_is_depth_16_without_drop_path():
    assert TransformerConfig() == TransformerConfig.from_depth(16, drop_path=0.0)


def test_gates_start_smaller_the_deeper_the_model():
    starts = [TransformerConfig.from_depth(depth).init_adaln_gamma for depth in (16, 20, 24, 30, 36)]
    assert starts == [1e-3, 1e-3, 1e-4, 1e-5, 5e-6]


@pytest.mark.parametrize(
    "change",
    [
        {"depth": 0},
        {"num_heads": 3},
        {"step_lengths": ()},
        {"step_lengths": (1, 0)},
        {"drop_path": 1.0},
        {"dropout": -0.1},
        {"mlp_ratio": 0.0},
    ],
)
def test_settings_that_cannot_work_are_refused(change):
    with pytest.raises(ConfigError):
        TransformerConfig(**change)
