"""JPEG's blocks and cut-off values are seen in pixels, whatever file they lie in, and others are not accused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from small_sets import draw, write_pngs

from varcli.data.emoji import unpack_emoji64
from varcli.data.images import open_images
from varcli.metrics.cautions import _GRID_CONTRAST
from varcli.metrics.npz import open_npz
from varcli.metrics.pixels import look_at, read_some, spread
from varcli.metrics.sources import from_folder, from_npz, from_tensor, from_tree


@pytest.fixture(scope="module")
def drawings(tmp_path_factory) -> list[Image.Image]:
    """A few emoji, as PIL images."""
    folder = tmp_path_factory.mktemp("images") / "emoji64"
    unpack_emoji64(folder)
    source = from_tree(open_images(folder), "val", 64, np.arange(0, 500, 20))
    return [Image.fromarray(image.permute(1, 2, 0).numpy()) for batch in source.batches(32) for image in batch]


def through_jpeg(images: list[Image.Image], folder, quality: int) -> np.ndarray:
    pixels = []
    for image in images:
        image.save(folder / "once.jpg", quality=quality, subsampling=0)
        pixels.append(np.asarray(Image.open(folder / "once.jpg")))
    return np.stack(pixels)


@pytest.mark.parametrize("quality", [95, 90, 75, 50])
def test_traces_of_jpeg_are_seen_in_png_and_npz_and_clean_drawings_are_not_accused(drawings, tmp_path, quality):
    clean = write_pngs(tmp_path / "clean", np.stack([np.asarray(image) for image in drawings]))
    pixels = through_jpeg(drawings, tmp_path, quality)
    np.savez(tmp_path / "jpeg.npz", arr_0=pixels)
    assert look_at(from_folder(clean)).grid_contrast < _GRID_CONTRAST
    assert look_at(from_folder(write_pngs(tmp_path / "jpeg", pixels))).grid_contrast > _GRID_CONTRAST
    assert look_at(from_npz(open_npz(tmp_path / "jpeg.npz"))).grid_contrast > _GRID_CONTRAST


def test_noise_and_plain_colour_have_no_grid(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (40, 64, 64, 3), dtype=np.uint8)
    assert look_at(from_folder(write_pngs(tmp_path / "noise", noise))).grid_contrast == pytest.approx(1, abs=0.03)
    plain = np.full((3, 64, 64, 3), 200, np.uint8)
    assert look_at(from_folder(write_pngs(tmp_path / "plain", plain))).grid_contrast is None
    assert look_at(from_folder(write_pngs(tmp_path / "tiny", plain[:, :16, :16]))).grid_contrast is None


def test_values_that_were_cut_off_are_told_from_rounded_ones(drawings):
    values = torch.rand(16, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 255
    assert look_at(from_tensor(values.to(torch.uint8))).is_truncated
    assert not look_at(from_tensor(values.round().to(torch.uint8))).is_truncated
    assert not look_at(from_tensor((values / 2).to(torch.uint8))).is_truncated
    pixels = np.stack([np.asarray(image) for image in drawings])
    assert not look_at(from_tensor(torch.from_numpy(pixels).permute(0, 3, 1, 2))).is_truncated


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_images_are_read_from_the_middle_of_any_archive(tmp_path, save):
    images = draw(9, seed=4)
    save(tmp_path / "samples.npz", arr_0=images)
    source = from_npz(open_npz(tmp_path / "samples.npz"))
    assert source.has_quick_seek == (save is np.savez)
    found = read_some(source, np.array([0, 3, 8]))
    assert list(found) == [0, 3, 8]
    for index, image in found.items():
        assert np.array_equal(image, images[index].transpose(2, 0, 1))
    assert read_some(source, np.array([], int)) == {}


def test_numbers_are_spread_over_the_set():
    assert spread(10, 3).tolist() == [0, 4, 9]
    assert spread(2, 64).tolist() == [0, 1]
    assert spread(1, 1).tolist() == [0]
