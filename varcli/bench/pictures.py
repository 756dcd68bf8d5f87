"""Made-up pictures on disk, as many as a benchmark needs: about as large as photographs, and no two alike."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from varcli.progress import OnStep, Step, ignore

_COARSE = 16  # pixels of a picture before it is enlarged
_GRAIN = 6  # grey levels at most; with it a 256 px PNG has some 120 kB, as photographs have
_CHUNK = 250  # pictures a task
_JPEG_QUALITY = 96  # with it 500 x 400 pixels have some 83 kB, nearly as much as ImageNet's photographs
_CLASSES = ("even", "odd")


def draw_picture(number: int, side: int, height: int | None = None) -> np.ndarray:
    """Return picture `number`, uint8 (height, side, 3): soft patches of colour with grain. The same each time.

    height: None makes it a square.
    """
    random = np.random.default_rng(number)
    coarse = Image.fromarray(random.integers(0, 256, (_COARSE, _COARSE, 3), np.uint8))
    soft = np.asarray(coarse.resize((side, height or side), Image.Resampling.BICUBIC), np.int16)
    grain = random.integers(-_GRAIN, _GRAIN + 1, soft.shape, np.int16)
    return (soft + grain).clip(0, 255).astype(np.uint8)


def write_pictures(folder: Path, count: int, side: int, workers: int, on_step: OnStep = ignore) -> None:
    """Write pictures 0 ... count - 1 as PNG files."""
    folder.mkdir(parents=True)
    _write_all(partial(_write_some, folder, count, side), count, workers, on_step)


def write_photographs(folder: Path, count: int, size: tuple[int, int], workers: int, on_step: OnStep = ignore) -> None:
    """Write pictures 0 ... count - 1 of `size` (width, height) as JPEG files, in the folders of two classes."""
    for name in _CLASSES:
        (folder / name).mkdir(parents=True)
    _write_all(partial(_write_jpegs, folder, count, size), count, workers, on_step)


def _write_all(write: Callable[[int], None], count: int, workers: int, on_step: OnStep) -> None:
    with ProcessPoolExecutor(max(1, workers), multiprocessing.get_context("spawn")) as pool:
        for done, _ in enumerate(pool.map(write, range(0, count, _CHUNK))):
            on_step(Step(min((done + 1) * _CHUNK, count), count, "images"))


def _write_some(folder: Path, count: int, side: int, start: int) -> None:
    for number in range(start, min(start + _CHUNK, count)):
        Image.fromarray(draw_picture(number, side)).save(_path(folder, number), compress_level=1)


def _write_jpegs(folder: Path, count: int, size: tuple[int, int], start: int) -> None:
    for number in range(start, min(start + _CHUNK, count)):
        path = folder / _CLASSES[number % len(_CLASSES)] / f"{number:06d}.jpg"
        Image.fromarray(draw_picture(number, *size)).save(path, quality=_JPEG_QUALITY)


def _path(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.png"
