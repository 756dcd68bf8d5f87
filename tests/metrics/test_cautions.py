"""Traps that cost others a wrong number are seen, and clean samples are left in peace."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from small_sets import write_pngs

from varcli.data.emoji import unpack_emoji64
from varcli.data.images import open_images
from varcli.metrics.cautions import _GRID_CONTRAST, grid_contrast
from varcli.metrics.published import PUBLISHED, beside
from varcli.metrics.sources import from_folder, from_tree


@pytest.fixture(scope="module")
def drawings(tmp_path_factory) -> list[Image.Image]:
    """A few emoji, as PIL images."""
    folder = tmp_path_factory.mktemp("images") / "emoji64"
    unpack_emoji64(folder)
    source = from_tree(open_images(folder), "val", 64, np.arange(0, 500, 20))
    return [Image.fromarray(image.permute(1, 2, 0).numpy()) for batch in source.batches(32) for image in batch]


@pytest.mark.parametrize("quality", [95, 90, 75, 50])
def test_traces_of_jpeg_are_seen_in_png_and_clean_drawings_are_not_accused(drawings, tmp_path, quality):
    clean = write_pngs(tmp_path / "clean", np.stack([np.asarray(image) for image in drawings]))
    (tmp_path / "jpeg").mkdir()
    for number, image in enumerate(drawings):
        image.save(tmp_path / "once.jpg", quality=quality, subsampling=0)
        Image.open(tmp_path / "once.jpg").save(tmp_path / "jpeg" / f"{number}.png")
    assert grid_contrast(from_folder(clean)) < _GRID_CONTRAST
    assert grid_contrast(from_folder(tmp_path / "jpeg")) > _GRID_CONTRAST


def test_noise_and_plain_colour_have_no_grid(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (40, 64, 64, 3), dtype=np.uint8)
    assert grid_contrast(from_folder(write_pngs(tmp_path / "noise", noise))) == pytest.approx(1, abs=0.03)
    plain = np.full((3, 64, 64, 3), 200, np.uint8)
    assert grid_contrast(from_folder(write_pngs(tmp_path / "plain", plain))) is None
    assert grid_contrast(from_folder(write_pngs(tmp_path / "tiny", plain[:, :16, :16]))) is None


def test_a_result_is_set_beside_its_neighbours_and_every_var():
    rows = beside({"fid": 2.2}, 256)
    assert [row.fid for row in rows] == sorted(row.fid for row in rows)
    names = {row.model for row in rows}
    assert {"DiT-XL/2", "VAR-d16", "VAR-d30", "validation data"} <= names
    assert "VQGAN" not in names
    assert beside({"fid": 2.2}, 64) == () == beside({"kid": 1.0}, 256)
    assert all(row.source for rows in PUBLISHED.values() for row in rows)
