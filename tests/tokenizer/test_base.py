"""Architectures for a size in pixels: patch_nums end at its grid, or one error says what does not fit."""

from __future__ import annotations

import re

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


@pytest.mark.parametrize("multipliers", [(1, 1, 2), (2, 3), (1, 4)])
@pytest.mark.parametrize("width", [8, 16, 24, 40])
def test_a_width_that_groups_do_not_divide_is_told_with_widths_and_groups_that_work(width, multipliers):
    with pytest.raises(ConfigError, match="norm_groups = 64") as caught:
        TokenizerConfig(width=width, channel_multipliers=multipliers, norm_groups=64)
    other, groups = map(int, re.search(r"such as (\d+), or norm_groups (\d+)", caught.value.hint).groups())
    assert TokenizerConfig(width=other, channel_multipliers=multipliers, norm_groups=64).width >= width
    assert TokenizerConfig(width=width, channel_multipliers=multipliers, norm_groups=groups).norm_groups > 1


@pytest.mark.parametrize("change", [{"patch_nums": (1, 10**6)}, {"width": 2**20}, {"num_res_blocks": 10**6}])
def test_sizes_beyond_any_tokenizer_are_refused_before_memory_is_taken(change):
    with pytest.raises(ConfigError, match="at most"):
        TokenizerConfig(**change)


def test_a_codebook_has_at_least_two_codes():
    with pytest.raises(ConfigError, match="vocab_size must be at least 2, but is 1"):
        TokenizerConfig(vocab_size=1)
