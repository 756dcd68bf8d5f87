"""Structural similarity of pairs of images.

Source: Wang, Bovik, Sheikh and Simoncelli, "Image quality assessment: from error visibility to structural similarity",
IEEE Transactions on Image Processing 13(4), 2004, Eq. 13 with the constants of its Sec. III.B and III.C.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from varcli.devices import float64_or_best
from varcli.errors import ShapeError
from varcli.shapes import check_shape

WINDOW = 11  # pixels, side of the window
_SIGMA = 1.5  # pixels, of the window's Gaussian
_K1, _K2, _PEAK = 0.01, 0.03, 255.0
_CHUNK = 8  # images at a time: five float64 maps of each are held


def ssim(images_B3HW: Tensor, others_B3HW: Tensor) -> Tensor:
    """Return the SSIM of each pair of uint8 images (B, 3, H, W), float64 (B,) in [-1, 1], 1 for equal ones.

    The mean over the three channels, each by itself, and over all places where the 11 x 11 window lies wholly inside the
    image. The images are not made smaller first, as some implementations do from 256 px on. Raises ShapeError for other
    shapes or dtypes, or images smaller than the window.
    """
    for name, images in (("images", images_B3HW), ("others", others_B3HW)):
        check_shape(name, images, ("B", 3, "H", "W"))
        if images.dtype != torch.uint8:
            raise ShapeError(f"{name} must be uint8, but are {images.dtype}")
    if images_B3HW.shape != others_B3HW.shape:
        raise ShapeError(f"images are {tuple(images_B3HW.shape)}, but others {tuple(others_B3HW.shape)}")
    if min(images_B3HW.shape[2:]) < WINDOW:
        raise ShapeError(f"SSIM needs images of {WINDOW} px and more, but these are {tuple(images_B3HW.shape[2:])}")
    chunks = zip(images_B3HW.split(_CHUNK), others_B3HW.split(_CHUNK), strict=True)
    return torch.cat([_ssim(x, y) for x, y in chunks])


def _ssim(x: Tensor, y: Tensor) -> Tensor:
    # float64: variances are differences of squares up to 65,025
    dtype = float64_or_best(x.device)
    x, y = x.to(dtype), y.to(dtype)
    mean_x, mean_y, mean_xx, mean_yy, mean_xy = _blur(torch.stack([x, y, x * x, y * y, x * y]))
    c1, c2 = (_K1 * _PEAK) ** 2, (_K2 * _PEAK) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    variances = mean_xx - mean_x**2 + mean_yy - mean_y**2
    contrast_structure = (2 * (mean_xy - mean_x * mean_y) + c2) / (variances + c2)
    return (luminance * contrast_structure).mean(dim=(1, 2, 3)).double().cpu()


def _blur(maps: Tensor) -> Tensor:
    """Average (..., H, W) with the Gaussian window, whose weights sum to 1: (..., H - 10, W - 10)."""
    offsets = torch.arange(WINDOW, dtype=maps.dtype, device=maps.device) - WINDOW // 2
    weights = torch.exp(-(offsets**2) / (2 * _SIGMA**2))
    weights = weights / weights.sum()
    flat = maps.flatten(0, -3).unsqueeze(1)
    flat = F.conv2d(F.conv2d(flat, weights.view(1, 1, -1, 1)), weights.view(1, 1, 1, -1))
    return flat.view(*maps.shape[:-2], *flat.shape[-2:])
