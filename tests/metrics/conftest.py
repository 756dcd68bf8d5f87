"""Samples and real images that the tests of metrics share."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_sets import draw, write_pngs


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
