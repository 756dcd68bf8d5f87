"""Small sets of images on disk, and the network that reads them without a download."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image


def draw(count: int, seed: int, side: int = 32) -> np.ndarray:
    """Smooth random colour fields, uint8 (count, side, side, 3)."""
    coarse = np.random.default_rng(seed).integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)
    return np.stack([np.asarray(Image.fromarray(image).resize((side, side), 2)) for image in coarse])


def write_pngs(folder: Path, images: np.ndarray, names: list[str] | None = None) -> Path:
    """Write images as PNG files."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(images):
        Image.fromarray(image).save(folder / (names[number] if names else f"{number}.png"))
    return folder


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    """A flat folder of 10 images of 32 px."""
    return write_pngs(tmp_path / "samples", draw(10, seed=1))


@pytest.fixture
def real(tmp_path: Path) -> Path:
    """An image tree with 12 training and 8 validation images of 32 px in two classes."""
    for split, count, seed in (("train", 6, 10), ("val", 4, 20)):
        for number, name in enumerate(("ant", "bee")):
            write_pngs(tmp_path / "real" / split / name, draw(count, seed + number))
    return tmp_path / "real"
