"""What is drawn at random while a tokenizer learns: moves of its images, scales left out, changes before the discriminator.

The changes that images and reconstructions share before a discriminator sees them keep it from learning its images by
heart: differentiable augmentation (DiffAugment, arXiv:2006.10738, Sec. 3.2, and its released strengths). Unlike there,
both images of a pair get the same change, so that only what the tokenizer lost tells them apart.

world: processes that have such a part of a batch each and equal generators: they draw for the whole batch, so that their
number changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from varcli.distributed import ALONE, World
from varcli.errors import unknown_name

Change = Callable[[Tensor], Tensor]
Draw = Callable[[Tensor, torch.Generator | None, World], Change]
"""Draws one change an image for a batch of the shape of the first argument, as this process's part of a larger batch."""

_BRIGHTNESS, _SATURATION, _CONTRAST = (-0.5, 0.5), (0.0, 2.0), (0.5, 1.5)  # of images in [-1, 1]
_REACH = 1 / 8  # of the side that images are moved at most
_HOLE = 1 / 2  # of the side that is cut out


def draw_colour(images: Tensor, generator: torch.Generator | None, world: World = ALONE) -> Change:
    """Brightness, then saturation, then contrast."""
    brightness, saturation, contrast = (
        _uniform(images, low, high, generator, world) for low, high in (_BRIGHTNESS, _SATURATION, _CONTRAST)
    )

    def change(x: Tensor) -> Tensor:
        x = x + brightness
        grey = x.mean(dim=1, keepdim=True)
        x = (x - grey) * saturation + grey
        middle = x.mean(dim=(1, 2, 3), keepdim=True)
        return (x - middle) * contrast + middle

    return change


def draw_translation(images: Tensor, generator: torch.Generator | None, world: World = ALONE) -> Change:
    """A move by whole pixels, up to an eighth of the side each way; zeros, which are grey, come in from outside."""
    rows_BH, columns_BW = (
        torch.arange(side, device=images.device) + _offsets(images, -_reach(side), _reach(side), generator, world)
        for side in images.shape[2:]
    )
    return lambda x: take_pixels(x, rows_BH, columns_BW, fill=0.0)


def draw_cutout(images: Tensor, generator: torch.Generator | None, world: World = ALONE) -> Change:
    """A square of half the side set to zero; its middle is anywhere, so that a part of it may lie outside."""
    _, _, height, width = images.shape

    def hole(side: int) -> Tensor:
        size = int(side * _HOLE + 0.5)
        start = _offsets(images, 0, side - size % 2, generator, world) - size // 2
        index = torch.arange(side, device=images.device)
        return (index >= start) & (index < start + size)

    is_kept = ~(hole(height).unsqueeze(2) & hole(width).unsqueeze(1)).unsqueeze(1)
    return lambda x: x * is_kept


AUGMENTATIONS: dict[str, Draw] = {"colour": draw_colour, "translation": draw_translation, "cutout": draw_cutout}
"""Every change by name."""


def take_pixels(images: Tensor, rows_BH: Tensor, columns_BW: Tensor, fill: float | None = None) -> Tensor:
    """Return images (B, 3, H, W) whose pixel (i, j) is that of `images` at (rows[i], columns[j]), for each image its own.

    fill: the value of what lies outside; None takes the nearest pixel of the border. Differentiable.
    """
    batch, _, height, width = images.shape
    picks = torch.arange(batch, device=images.device).view(batch, 1, 1)
    rows, columns = rows_BH.clamp(0, height - 1), columns_BW.clamp(0, width - 1)
    moved = images.permute(0, 2, 3, 1)[picks, rows.unsqueeze(2), columns.unsqueeze(1)].permute(0, 3, 1, 2)
    if fill is None:
        return moved
    is_inside = (rows == rows_BH).unsqueeze(2) & (columns == columns_BW).unsqueeze(1)
    return torch.where(is_inside.unsqueeze(1), moved, fill)


def mirror_and_shift(
    images_u8: Tensor, *, flip: bool, shift: int, generator: torch.Generator | None, world: World = ALONE
) -> Tensor:
    """Move uint8 images (B, 3, H, W) by whole pixels at random, the border repeated; returns floats in [-1, 1].

    flip: mirror every other one. shift: pixels at most, each way. world: as for the module.
    """
    rows_BH, columns_BW = (
        torch.arange(side, device=images_u8.device) + _offsets(images_u8, -shift, shift, generator, world)
        for side in images_u8.shape[2:]
    )
    if flip:
        is_mirrored = _uniform(images_u8, 0.0, 1.0, generator, world).view(-1, 1) < 0.5
        columns_BW = torch.where(is_mirrored, columns_BW.flip(1), columns_BW)
    return take_pixels(images_u8, rows_BH, columns_BW).float() / 127.5 - 1


def draw_kept_scales(
    batch: int, num_scales: int, share: float, generator: torch.Generator, device: torch.device
) -> Tensor:
    """Draw how many coarse scales each of a batch keeps: all, or for a `share` of them a uniform number below that: (B,)."""
    some = torch.randint(1, max(num_scales, 2), (batch,), generator=generator, device=device)
    dropped = torch.rand(batch, generator=generator, device=device) < share
    return torch.where(dropped & (num_scales > 1), some, num_scales)


def augment_pair(
    real: Tensor, fake: Tensor, names: Sequence[str], generator: torch.Generator | None, world: World = ALONE
) -> tuple[Tensor, Tensor]:
    """Change images and their reconstructions alike and differentiably, by each of `names` of `AUGMENTATIONS` in turn.

    (B, 3, H, W) in [-1, 1] in and (B, 3, H, W) out, which may leave that range. world: as for the module.
    Raises ConfigError for an unknown name.
    """
    for name in names:
        if name not in AUGMENTATIONS:
            raise unknown_name("augmentation", name, AUGMENTATIONS)
        change = AUGMENTATIONS[name](real, generator, world)
        real, fake = change(real), change(fake)
    return real, fake


def _uniform(images: Tensor, low: float, high: float, generator: torch.Generator | None, world: World) -> Tensor:
    """One number an image, (B, 1, 1, 1)."""
    whole = torch.empty(len(images) * world.size, 1, 1, 1, device=images.device)
    return world.share(whole.uniform_(low, high, generator=generator))


def _offsets(images: Tensor, low: int, high: int, generator: torch.Generator | None, world: World) -> Tensor:
    """One whole number an image, from `low` to `high`, both included: (B, 1)."""
    shape = (len(images) * world.size, 1)
    return world.share(torch.randint(low, high + 1, shape, device=images.device, generator=generator))


def _reach(side: int) -> int:
    return int(side * _REACH + 0.5)
