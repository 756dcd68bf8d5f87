"""Random changes that images and reconstructions share before a discriminator sees them, so that it cannot learn its
images by heart: differentiable augmentation (DiffAugment, arXiv:2006.10738, Sec. 3.2, and its released strengths).

Unlike there, both images of a pair get the same change, so that only what the tokenizer lost tells them apart.
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
    batch, _, height, width = images.shape
    rows, columns = (_offsets(images, -_reach(side), _reach(side), generator, world) for side in (height, width))
    row_index = torch.arange(height, device=images.device) + rows
    column_index = torch.arange(width, device=images.device) + columns
    is_inside = _within(row_index, height).unsqueeze(2) & _within(column_index, width).unsqueeze(1)
    picks = torch.arange(batch, device=images.device).view(batch, 1, 1)
    row_index, column_index = row_index.clamp(0, height - 1), column_index.clamp(0, width - 1)

    def change(x: Tensor) -> Tensor:
        moved = x.permute(0, 2, 3, 1)[picks, row_index.unsqueeze(2), column_index.unsqueeze(1)].permute(0, 3, 1, 2)
        return moved * is_inside.unsqueeze(1)

    return change


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


def augment_pair(
    real: Tensor, fake: Tensor, names: Sequence[str], generator: torch.Generator | None, world: World = ALONE
) -> tuple[Tensor, Tensor]:
    """Change images and their reconstructions alike and differentiably, by each of `names` of `AUGMENTATIONS` in turn.

    (B, 3, H, W) in [-1, 1] in and (B, 3, H, W) out, which may leave that range. world: processes that have such a
    part of a batch each and equal generators: they draw for the whole batch, so that their number changes nothing.
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


def _within(index: Tensor, side: int) -> Tensor:
    return (index >= 0) & (index < side)
