"""Views are pure functions of (seed, path, view), and the crops are VAR's."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from varcli.bench.pictures import draw_picture
from varcli.config import to_dict
from varcli.data.decode import UnusableImage, load_image
from varcli.data.views import DecodeConfig, cut_view, prepare
from varcli.data.worker import run_task
from varcli.errors import ConfigError


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8))


def view(
    image: Image.Image, config: DecodeConfig, path: str = "a.png", number: int = 0, flip: bool = False
) -> np.ndarray:
    return cut_view(prepare(image, config), config, path, number, flip)


@pytest.mark.parametrize("size", [(50, 37), (37, 50), (33, 33), (300, 41), (18, 18), (101, 36)])
def test_the_centre_crop_equals_torchvisions(size):
    from torchvision import transforms

    reference = transforms.Compose(
        [transforms.Resize(36, interpolation=transforms.InterpolationMode.LANCZOS), transforms.CenterCrop(32)]
    )
    expected = np.asarray(reference(noise(*size))).transpose(2, 0, 1)
    assert np.array_equal(view(noise(*size), DecodeConfig(size=32)), expected)


def test_random_crops_are_parts_of_the_resized_image_and_depend_on_seed_path_and_view():
    image, config = noise(80, 60), DecodeConfig(size=32, crop="random")
    resized = np.asarray(prepare(image, config)).transpose(2, 0, 1)
    assert resized.shape[1:] == (36, 48)
    crops = {}
    for seed in (0, 1):
        for path in ("a", "b"):
            for number in range(4):
                changed = DecodeConfig(size=32, crop="random", seed=seed)
                crop = view(image, changed, path, number)
                assert np.array_equal(crop, view(image, changed, path, number))
                windows = np.lib.stride_tricks.sliding_window_view(resized, crop.shape)
                assert (windows == crop).all((3, 4, 5)).any()
                crops[crop.tobytes()] = None
    assert len(crops) > 12  # of 16; 85 places exist


def test_whole_images_are_not_touched():
    image = noise(32, 32)
    for config in (DecodeConfig(size=32, crop="none"), DecodeConfig(size=32, crop="none", augment="shift")):
        assert np.array_equal(view(image, config, flip=True), np.asarray(image).transpose(2, 0, 1))


def test_whole_images_of_another_shape_are_fitted_and_filled():
    config = DecodeConfig(size=32, crop="none", fill=(1, 2, 3))
    wide = view(Image.new("RGB", (64, 16), "red"), config)
    assert wide[:, 0, 0].tolist() == [1, 2, 3]
    assert wide[:, 16, 16].tolist() == [255, 0, 0]


def test_shifted_views_keep_the_middle_and_the_background():
    image = Image.new("RGB", (64, 64), "white")
    image.paste("blue", (20, 20, 44, 44))
    config = DecodeConfig(size=64, crop="none", augment="shift")
    views = [view(image, config, number=number) for number in range(1, 20)]
    assert len({one.tobytes() for one in views}) == len(views)
    for one in views:
        assert one[:, 32, 32].tolist() == [0, 0, 255]
        assert (one[:, 0] == 255).all()
        assert (one[:, :, -1] == 255).all()
        assert 0.75 * 24**2 < (one[0] < 128).sum() < 1.3 * 24**2


def test_no_change_of_place_means_no_change_of_pixels():
    config = DecodeConfig(size=64, crop="none", augment="shift", max_rotation=0, max_scaling=0, max_shift=0)
    smooth = noise(8, 8).resize((64, 64), Image.Resampling.BICUBIC)
    moved = view(smooth, config, number=1).astype(int)
    assert np.abs(moved - np.asarray(smooth).transpose(2, 0, 1)).max() <= 6  # up and down again by Lanczos


def test_colour_changes_keep_black_white_and_the_first_view_and_move_the_rest():
    image = noise(32, 32)
    image.paste("white", (0, 0, 32, 8))
    image.paste("black", (0, 8, 32, 16))
    config, plain = DecodeConfig(size=32, crop="none", colour=1.0), np.asarray(image).transpose(2, 0, 1)
    assert np.array_equal(view(image, config), plain)
    views = [view(image, config, number=number) for number in range(1, 9)]
    assert len({one.tobytes() for one in views}) == len(views)
    for one in views:
        assert (one[:, :8] == 255).all() and (one[:, 8:16] == 0).all()
        assert np.abs(one.astype(int) - plain).mean() > 2
    weak = view(image, DecodeConfig(size=32, crop="none", colour=0.1), number=1)
    assert np.abs(weak.astype(int) - plain).mean() < np.abs(views[0].astype(int) - plain).mean()


def test_only_flip_classes_are_mirrored():
    image = noise(32, 32)
    config = DecodeConfig(size=32, crop="none", flip_classes=("a",))
    plain = np.asarray(image).transpose(2, 0, 1)
    kept = [np.array_equal(view(image, config, number=number, flip=True), plain) for number in range(1, 41)]
    mirrored = [
        np.array_equal(view(image, config, number=number, flip=True), plain[:, :, ::-1]) for number in range(1, 41)
    ]
    assert 8 < sum(mirrored) < 32
    assert sum(kept) + sum(mirrored) == 40
    assert all(np.array_equal(view(image, config, number=number), plain) for number in range(5))


def test_long_thin_images_are_used_or_skipped():
    config = DecodeConfig(size=32, max_pixels=10**5)
    assert view(Image.new("RGB", (1, 20)), config).shape == (3, 32, 32)
    with pytest.raises(UnusableImage, match="thin"):
        prepare(Image.new("RGB", (1, 5000)), config)


@pytest.mark.parametrize(
    "fields",
    [
        {"size": 0},
        {"resize_ratio": 0.9},
        {"augment": "shift"},
        {"crop": "left"},
        {"fill": (1, 2)},
        {"max_shift": 2.0},
        {"colour": 1.5},
        {"colour": float("nan")},
    ],
)
def test_configs_that_cannot_work_are_refused(fields):
    with pytest.raises(ConfigError):
        DecodeConfig(**{"size": 8, **fields})


def stored(folder, width: int, height: int) -> str:
    """A JPEG as photographs are: smooth, with a little grain."""
    Image.fromarray(draw_picture(width, width, height)).save(folder / f"{width}.jpg", quality=95)
    return f"{width}.jpg"


@pytest.mark.parametrize("crop", ["center", "random", "none"])
def test_a_reduced_jpeg_gives_nearly_the_pixels_of_the_whole(tmp_path, crop):
    path = stored(tmp_path, 701, 499)  # no multiple of the blocks that are reduced
    pixels = {}
    for reduced in (False, True):
        config = DecodeConfig(size=32, crop=crop, reduced=reduced)
        task = {"do": "decode", "config": to_dict(config), "root": str(tmp_path), "shape": None}
        task["images"] = [[path, [0, 1], False]]
        header, pixels[reduced] = run_task(task, b"")
        assert header["rows"] == [(0, 0), (0, 1)] and header["notes"] == []
    difference = np.abs(pixels[True].astype(int) - pixels[False])
    # full contrast every three pixels, which photographs of 256 px have not: those differ by 2 at most
    assert 0 < difference.max() <= 5 and difference.mean() < 0.6


def test_only_what_is_far_larger_than_needed_is_reduced(tmp_path):
    config = DecodeConfig(size=32, reduced=True)
    assert config.enough((701, 499)) == (2 * 50, 2 * 36)
    sizes = {}
    for width, height in ((701, 499), (140, 100)):
        path = tmp_path / stored(tmp_path, width, height)
        sizes[width] = load_image(path, enough=config.enough)[0].size
        assert load_image(path)[0].size == (width, height)
    assert sizes == {701: (176, 125), 140: (140, 100)}
    exact = DecodeConfig(size=32, crop="exact", reduced=True)
    assert load_image(tmp_path / "701.jpg", enough=exact.enough)[0].size == (701, 499)


def test_a_description_names_what_decides_pixels_and_stays_what_it_was():
    assert "reduced" not in DecodeConfig(size=32).describe()
    assert DecodeConfig(size=32, reduced=True).describe()["reduced"] is True
    assert DecodeConfig(size=32).describe().keys() | {"reduced"} == to_dict(DecodeConfig(size=32)).keys()
