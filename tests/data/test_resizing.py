"""A part of a resized image is exactly what resizing all of it gives."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from varcli.data.resizing import exact_span, resize_part
from varcli.data.views import DecodeConfig, cut_view, cut_views, prepare


def noise(width: int, height: int) -> Image.Image:
    """Full contrast, so that sums are clipped and a pixel that comes from elsewhere is seen."""
    return Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8))


def sizes() -> list[tuple[int, int]]:
    """What photographs have, then anything: larger, smaller, tall, wide."""
    random = np.random.default_rng(1)
    usual = [(500, 375), (375, 500), (500, 400), (500, 333), (640, 480), (347, 500), (36, 48), (36, 36)]
    return usual + [tuple(random.integers(20, 400, 2).tolist()) for _ in range(40)]


@pytest.mark.parametrize("crop", ["center", "random"])
def test_one_view_cut_directly_equals_the_view_of_the_whole(crop):
    for number, (width, height) in enumerate(sizes()):
        config = DecodeConfig(size=32, crop=crop, seed=number)
        (direct,) = cut_views(noise(width, height), config, "a.png", [0], False)
        whole = cut_view(prepare(noise(width, height), config), config, "a.png", 0, False)
        assert np.array_equal(direct, whole), (width, height)


def test_every_corner_of_an_awkward_size_is_exact():
    image = noise(313, 302)  # no common divisor with what it becomes
    whole = np.asarray(image.resize((298, 288), Image.Resampling.LANCZOS))
    for left, top in ((0, 0), (42, 32), (17, 9), (1, 31)):
        part = np.asarray(resize_part(image, (298, 288), (left, top), 256))
        assert np.array_equal(part, whole[top : top + 256, left : left + 256]), (left, top)


@pytest.mark.parametrize(("side", "target"), [(500, 360), (375, 288), (469, 349), (302, 288)])
def test_spans_hold_the_square_and_their_edges_are_exact_in_single_precision(side, target):
    for first in range(0, target - 256 + 1, 7):
        start, stop = exact_span(first, 256, side, target)
        assert 0 <= start <= first < first + 256 <= stop <= target
        for place in (start, stop):
            assert int(np.float32(place * side / target) * 2.0**12) * target == place * side * 2**12
