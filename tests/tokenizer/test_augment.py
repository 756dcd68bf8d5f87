"""What is drawn at random: pairs changed alike, each image its own way, with gradients; moves; scales left out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from varcli.errors import ConfigError
from varcli.tokenizer.augment import (
    AUGMENTATIONS,
    augment_pair,
    draw_kept_scales,
    mirror_and_shift,
    take_pixels,
)


def dice(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(batch: int = 4, height: int = 16, width: int = 16) -> torch.Tensor:
    return torch.rand(batch, 3, height, width, generator=dice(7)) * 2 - 1


@pytest.mark.parametrize("names", [*((name,) for name in AUGMENTATIONS), tuple(AUGMENTATIONS)])
def test_both_of_a_pair_get_the_same_change_and_equal_images_stay_equal(names):
    images = pictures()
    real, fake = augment_pair(images, images.clone(), names, dice())
    assert torch.equal(real, fake)
    assert not torch.equal(real, images) and real.shape == images.shape
    again, _ = augment_pair(images, images, names, dice())
    assert torch.equal(real, again)


def test_each_image_gets_its_own_change():
    one = pictures(1).expand(8, -1, -1, -1)
    for name in AUGMENTATIONS:
        changed, _ = augment_pair(one, one, (name,), dice())
        assert len({image.numpy().tobytes() for image in changed}) > 4, name


def test_no_names_leave_the_images_alone_and_unknown_ones_are_refused():
    images = pictures()
    assert augment_pair(images, images, (), dice())[0] is images
    with pytest.raises(ConfigError, match="`color`"):
        augment_pair(images, images, ("color",), dice())


def test_a_translation_moves_up_to_an_eighth_and_brings_in_zeros():
    images = torch.ones(200, 3, 16, 16)
    moved, _ = augment_pair(images, images, ("translation",), dice())
    rows = 16 - moved[:, 0].amax(dim=2).sum(dim=1)
    assert set(rows.tolist()) == {0, 1, 2}
    assert set(moved.unique().tolist()) == {0, 1}


def test_a_translated_image_is_the_same_pixels_elsewhere():
    index = torch.arange(16.0).view(1, 1, 16, 1).expand(50, 3, 16, 16) + 1
    moved, _ = augment_pair(index, index, ("translation",), dice())
    for column in moved[:, 0, :, 8]:
        inside = column[column > 0]
        assert torch.equal(inside.diff(), torch.ones(len(inside) - 1))


@pytest.mark.parametrize("height, width", [(16, 16), (8, 12), (9, 7)])
def test_a_cutout_takes_at_most_a_square_of_half_the_side_and_can_reach_every_pixel(height, width):
    images = torch.ones(2000, 3, height, width)
    cut, _ = augment_pair(images, images, ("cutout",), dice())
    holes = cut[:, 0] == 0
    assert holes.flatten(1).sum(dim=1).max() == int(height / 2 + 0.5) * int(width / 2 + 0.5)
    assert holes.flatten(1).sum(dim=1).min() >= 1
    assert holes.any(dim=0).all()


def test_colour_keeps_a_grey_image_grey_and_its_shape():
    grey = torch.linspace(-1, 1, 16).view(1, 1, 1, 16).expand(20, 3, 16, 16)
    changed, _ = augment_pair(grey, grey, ("colour",), dice())
    torch.testing.assert_close(changed[:, 0], changed[:, 2])
    slopes = (changed[:, 0, 0, -1] - changed[:, 0, 0, 0]) / 2
    assert slopes.min() >= 0.5 - 1e-5 and slopes.max() <= 1.5 + 1e-5 and slopes.max() - slopes.min() > 0.5
    assert (changed.mean(dim=(1, 2, 3)).abs() <= 0.5 + 1e-5).all()


def test_gradients_reach_the_reconstructions_through_every_change():
    images, fake = pictures(), pictures().requires_grad_()
    _, seen = augment_pair(images, fake, tuple(AUGMENTATIONS), dice())
    seen.square().sum().backward()
    assert fake.grad.isfinite().all() and (fake.grad != 0).flatten(1).any(dim=1).all()


def test_mirrored_and_shifted_images_are_the_same_pixels_moved():
    images = torch.randint(0, 256, (3, 3, 8, 8), dtype=torch.uint8, generator=dice()).repeat(8, 1, 1, 1)
    plain = images.float() / 127.5 - 1
    assert torch.equal(mirror_and_shift(images, flip=False, shift=0, generator=dice()), plain)
    mirrored = mirror_and_shift(images, flip=True, shift=0, generator=dice())
    is_same, is_mirrored = (
        [torch.equal(after, before) for after, before in zip(mirrored, expected, strict=True)]
        for expected in (plain, plain.flip(3))
    )
    assert all(a != b for a, b in zip(is_same, is_mirrored, strict=True)) and any(is_same) and any(is_mirrored)
    shifted = mirror_and_shift(images, flip=False, shift=2, generator=dice())
    for before, after in zip(plain, shifted, strict=True):
        padded = F.pad(before.unsqueeze(0), (2, 2, 2, 2), mode="replicate")[0]
        assert any(torch.equal(after, padded[:, i : i + 8, j : j + 8]) for i in range(5) for j in range(5))


def test_pixels_from_outside_are_the_border_or_the_fill():
    image = torch.arange(1.0, 5.0).view(1, 1, 2, 2)
    places = torch.tensor([[-1, 0]])
    assert take_pixels(image, places, places).flatten().tolist() == [1, 1, 1, 1]
    assert take_pixels(image, places, places + 1, fill=9.0).flatten().tolist() == [9, 9, 1, 2]


def test_dropped_scales_leave_at_least_the_coarsest():
    kept = draw_kept_scales(1000, 3, 0.5, dice(), torch.device("cpu"))
    assert set(kept.tolist()) == {1, 2, 3}
    assert (kept == 3).float().mean() == pytest.approx(0.5, abs=0.06)
    assert (draw_kept_scales(50, 3, 0.0, dice(), torch.device("cpu")) == 3).all()
    assert (draw_kept_scales(50, 1, 1.0, dice(), torch.device("cpu")) == 1).all()
