"""Architectures for a size in pixels: patch_nums end at its grid, or one error says what does not fit."""

from __future__ import annotations

import pytest

from varcli.errors import ConfigError
from varcli.scales import NAMED_SCHEDULES, PatchNums
from varcli.tokenizer import TokenizerConfig


@pytest.mark.parametrize("size", [16, 48, 64, 80, 128, 192, 256, 320, 512, 1024])
def test_patch_nums_end_at_the_grid_of_the_size_and_rise_to_it(size):
    config = TokenizerConfig.for_side(size).at_size(size)
    assert config.image_size == size and config.patch_nums[0] == 1
    assert all(a < b for a, b in zip(config.patch_nums, config.patch_nums[1:], strict=False))


def test_the_published_sizes_have_the_published_schedules():
    for name, sides in NAMED_SCHEDULES.items():
        assert TokenizerConfig().at_size(int(name)).patch_nums == sides
    assert TokenizerConfig.for_side(64).at_size(64) == TokenizerConfig.for_side(64)
    assert PatchNums.up_to(1).sides == (1,)


def test_given_patch_nums_are_kept():
    assert TokenizerConfig().at_size(256, [1, 4, 16]).patch_nums == (1, 4, 16)


@pytest.mark.parametrize(
    "size, sides, text",
    [(250, None, "use 240 or 256 px"), (8, None, "use 16 or 32 px"), (256, (1, 2, 8), "end them at 16")],
)
def test_what_does_not_fit_is_one_error_that_says_what_does(size, sides, text):
    with pytest.raises(ConfigError) as caught:
        TokenizerConfig().at_size(size, sides)
    assert text in (caught.value.hint or "")
