"""SSIM is what its paper says."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small_sets import draw

from varcli.errors import ShapeError
from varcli.metrics.ssim import ssim


def batch(count: int, seed: int, side: int = 16) -> torch.Tensor:
    return torch.from_numpy(draw(count, seed, side)).permute(0, 3, 1, 2).contiguous()


def naive(x: np.ndarray, y: np.ndarray) -> float:
    """Wang et al. 2004, Eq. 13, window by window, for one channel (H, W)."""
    offsets = np.arange(11) - 5
    window = np.exp(-(offsets[:, None] ** 2 + offsets[None] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    values = []
    for top in range(x.shape[0] - 10):
        for left in range(x.shape[1] - 10):
            a, b = (image[top : top + 11, left : left + 11].astype(float) for image in (x, y))
            mean_a, mean_b = (window * a).sum(), (window * b).sum()
            variance_a, variance_b = (window * (a - mean_a) ** 2).sum(), (window * (b - mean_b) ** 2).sum()
            covariance = (window * (a - mean_a) * (b - mean_b)).sum()
            values.append(
                (2 * mean_a * mean_b + c1)
                * (2 * covariance + c2)
                / ((mean_a**2 + mean_b**2 + c1) * (variance_a + variance_b + c2))
            )
    return float(np.mean(values))


def test_it_is_the_formula_of_the_paper_window_by_window():
    images = batch(10, seed=0)  # more than are computed at a time
    others = (images.int() + torch.randint(-40, 40, images.shape)).clamp(0, 255).to(torch.uint8)
    expected = [
        np.mean([naive(x, y) for x, y in zip(image.numpy(), other.numpy(), strict=True)])
        for image, other in zip(images, others, strict=True)
    ]
    np.testing.assert_allclose(ssim(images, others).numpy(), expected, rtol=1e-9)


def test_equal_images_have_1_and_flat_ones_differ_by_luminance_alone():
    images = batch(3, seed=1)
    np.testing.assert_allclose(ssim(images, images).numpy(), 1, rtol=1e-12)
    flat = torch.full((1, 3, 11, 12), 100, dtype=torch.uint8)
    c1 = (0.01 * 255) ** 2
    expected = (2 * 100 * 50 + c1) / (100**2 + 50**2 + c1)
    assert float(ssim(flat, flat // 2)) == pytest.approx(expected, rel=1e-9)


def test_it_does_not_depend_on_which_comes_first():
    images, others = batch(2, seed=2), batch(2, seed=3)
    np.testing.assert_allclose(ssim(images, others).numpy(), ssim(others, images).numpy(), rtol=1e-12)


@pytest.mark.parametrize(
    "others",
    [
        torch.zeros(2, 3, 16, 16),
        torch.zeros(1, 3, 16, 16, dtype=torch.uint8),
        torch.zeros(2, 1, 16, 16, dtype=torch.uint8),
    ],
    ids=["floats", "another count", "grey"],
)
def test_what_does_not_fit_is_refused(others):
    with pytest.raises(ShapeError):
        ssim(torch.zeros(2, 3, 16, 16, dtype=torch.uint8), others)


def test_images_smaller_than_the_window_are_refused():
    small = torch.zeros(1, 3, 10, 16, dtype=torch.uint8)
    with pytest.raises(ShapeError, match="11 px and more"):
        ssim(small, small)
