"""What a look at some images' pixels tells: traces of JPEG, and values that were cut off where they should be rounded."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from varcli.metrics.sources import ImageSource

_LOOKED_AT = 64  # images
_SMALLEST_GRID = 24  # pixels: three blocks of JPEG
_BATCH = 64  # images at a time where reading from the middle is slow
_BRIGHT = slice(250, 255)  # values that must be there before the missing 255 says something
_MIN_BRIGHT = 100  # of each of them; half as many 255 would be expected


@dataclass(frozen=True, kw_only=True)
class PixelTraces:
    """What was seen."""

    grid_contrast: float | None  # see `grid_contrast`
    is_truncated: bool  # no value is 255, though 250 ... 254 all are common: rounding would give half as many


def look_at(source: ImageSource) -> PixelTraces:
    """Look at some images spread over `source`.

    Truncation shows only where no image reaches full white; clipped ones hide it. Raises what reading images raises.
    """
    images = [torch.from_numpy(image) for image in read_some(source, spread(source.count, _LOOKED_AT)).values()]
    values = sum(
        (torch.bincount(image.flatten(), minlength=256) for image in images), torch.zeros(256, dtype=torch.int64)
    )
    return PixelTraces(
        grid_contrast=grid_contrast(images),
        is_truncated=int(values[255]) == 0 and int(values[_BRIGHT].min()) >= _MIN_BRIGHT,
    )


def grid_contrast(images: Iterable[Tensor]) -> float | None:
    """Return how much stronger steps between pixels are on the borders of 8 x 8 blocks than beside them.

    images: uint8 (3, H, W). A step counts up to one grey level, so that edges, which a drawing may have anywhere, do not
    outweigh the faint steps that JPEG's blocks leave everywhere. About 1 without JPEG, None for images too small to tell,
    or without any contrast.
    """
    at_border = beside = 0.0
    for image in images:
        if min(image.shape[1:]) < _SMALLEST_GRID:
            continue
        grey = image.float().mean(dim=0)
        for steps in (torch.diff(grey, dim=0).T, torch.diff(grey, dim=1)):
            columns = steps.abs().clamp(max=1).mean(dim=0)  # step k lies between pixels k and k + 1
            borders = torch.arange(7, len(columns) - 1, 8)
            at_border += float(columns[borders].sum())
            beside += float((columns[borders - 1] + columns[borders + 1]).sum()) / 2
    return at_border / beside if beside > 0 else None


def spread(count: int, wanted: int) -> np.ndarray:
    """Return up to `wanted` numbers spread over 0 ... count - 1, ascending, int64."""
    return np.unique(np.linspace(0, count - 1, wanted).astype(np.int64))


def read_some(source: ImageSource, indices: np.ndarray) -> dict[int, np.ndarray]:
    """Return the images with these numbers (ascending), uint8 (3, H, W) each, by number."""
    wanted = [int(index) for index in indices]
    if not wanted:
        return {}
    if source.has_quick_seek:
        return {index: next(iter(source.batches(1, index, index + 1, workers=0)))[0].numpy() for index in wanted}
    found, start = {}, 0
    for images in source.batches(_BATCH, 0, wanted[-1] + 1, workers=0):
        found |= {
            index: images[index - start].numpy().copy() for index in wanted if start <= index < start + len(images)
        }
        start += len(images)
    return found
