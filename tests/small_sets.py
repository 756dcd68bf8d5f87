"""Small sets of images on disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
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


def write_tiny_images(root: Path) -> Path:
    """Write an image tree with train/ and val/: 3 classes of coloured 32 px PNGs, 5 and 2 a class."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 5), ("val", 2)):
        for index, name in enumerate(("apple", "boat", "cat")):
            images = generator.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
            images[:, :16, :, index] = 255
            write_pngs(root / split / name, images)
    return root
