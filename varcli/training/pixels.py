"""The images a tokenizer learns from: the batch of any step as a pure function of seed and step.

Small sets of images that have the tokenizer's size are kept in memory, decoded (`Pixels`); all others are decoded anew
each epoch, with another crop each time (`varcli.training.pixel_stream.PixelStream`). Each is an `ImageSource`, and both give
the same samples.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from varcli.data.batches import ShuffledOrder
from varcli.data.defaults import default_decode
from varcli.data.images import ImageTree
from varcli.data.skips import Skips
from varcli.data.stream import decode_images
from varcli.data.views import DecodeConfig
from varcli.progress import OnStep, Step, ignore
from varcli.training.pixel_stream import STAND_IN, PixelStream, require_batch, spread_rows

_MAX_BYTES = 8 * 2**30  # decoded images are kept in memory up to this size, or a quarter of the machine's
_DEVICE_SHARE = 0.25  # of a GPU's free memory that they may take; beyond it they stay in the machine's
_MAX_HELD_OUT = 4096  # held-out images that are measured
_MAX_HELD_OUT_BYTES = 2**30


class ImageSource(Protocol):
    """Images to learn from, however they are kept: endlessly many samples, each image once an epoch, in a new order."""

    def __len__(self) -> int:
        """Images of an epoch."""

    def rows(self, position: int, count: int) -> list[int]:
        """Places, in the split, of samples [position, position + count) of the run."""

    def batch(self, position: int, count: int) -> Tensor:
        """Samples [position, position + count) of the run: uint8 (count, 3, H, W), on the device.

        A sample depends on the seed and its position alone.
        """

    def spread(self, count: int) -> Tensor:
        """Up to `count` images, evenly spread over all, cut the same each time: uint8 (n, 3, H, W), on the device."""


class Pixels:
    """Decoded images in memory, shuffled anew each epoch.

    images: uint8 (N, 3, H, W). device: where batches go, None is where the images are.
    """

    def __init__(self, images: Tensor, seed: int = 0, device: torch.device | None = None) -> None:
        self.images = images
        self.device = images.device if device is None else device
        self.order = ShuffledOrder(max(1, len(images)), seed)

    def __len__(self) -> int:
        return len(self.images)

    def rows(self, position: int, count: int) -> list[int]:
        """Places of samples [position, position + count) of the run."""
        return [int(row) for row in self.order.indices(position, count)]

    def batch(self, position: int, count: int) -> Tensor:
        """Samples [position, position + count) of the run: uint8 (count, 3, H, W)."""
        return self._take(self.order.indices(position, count))

    def spread(self, count: int) -> Tensor:
        """Up to `count` images, evenly spread over all: uint8 (n, 3, H, W)."""
        return self._take(spread_rows(len(self.images), count))

    def _take(self, rows: np.ndarray) -> Tensor:
        where, found = self.images.device, torch.as_tensor(rows)
        if where.type == "cuda":  # from pinned memory, else the copy waits for the step before
            found = found.pin_memory().to(where, non_blocking=True)
        return self.images[found].to(self.device)


@contextmanager
def open_pixels(
    tree: ImageTree,
    split: str,
    size: int,
    *,
    batch_size: int,
    seed: int = 0,
    device: torch.device | None = None,
    workers: int | None = None,
    skips: Skips | None = None,
    on_step: OnStep = ignore,
    sharers: int = 1,
) -> Iterator[ImageSource]:
    """Yield the samples of a split for training at `size` px; on the way out the processes that decode are ended.

    An image that cannot be used has the next usable one of the listing in its place, so that batches keep their size and
    a sample depends on seed and position alone. workers: processes that decode; None chooses, 0 is this one. sharers:
    processes that keep images in this machine's memory, which is divided among them.
    Raises DataError if there are fewer usable images than `batch_size`, SkipLimitError if too many are not; a stream
    raises them when it comes upon them.
    """
    where = torch.device("cpu") if device is None else device
    skips = Skips(tree) if skips is None else skips
    decode = default_decode(tree, size, seed=seed)[split]
    count = len(tree.splits[split])
    require_batch(count, count, batch_size)
    if decode.crop == "none" and count * 3 * size * size <= _memory_limit(sharers):
        images, usable = read_pixels(tree, split, decode, np.arange(count), workers, skips, on_step)
        require_batch(int(usable.sum()), count, batch_size, skips)
        places = np.flatnonzero(usable)
        for lost in np.flatnonzero(~usable):
            images[lost] = images[places[np.searchsorted(places, lost) % len(places)]]
        skips.tell(STAND_IN)
        yield Pixels(_place(images, where), seed, where)
        return
    stream = PixelStream(
        tree, split, decode, batch_size=batch_size, seed=seed, device=where, workers=workers, skips=skips
    )
    try:
        yield stream
        skips.tell(STAND_IN)
    finally:
        stream.close()


def read_held_out(
    tree: ImageTree,
    split: str,
    size: int,
    *,
    workers: int | None = None,
    skips: Skips | None = None,
    on_step: OnStep = ignore,
) -> Tensor:
    """Decode the images to measure on: uint8 (N, 3, size, size), whole or cut in the centre, without unusable ones.

    At most 4,096 of them and 1 GiB, evenly spread over the split.
    """
    skips = Skips(tree) if skips is None else skips
    decode = default_decode(tree, size)[split]
    rows = spread_rows(len(tree.splits[split]), max(1, min(_MAX_HELD_OUT, _MAX_HELD_OUT_BYTES // (3 * size * size))))
    images, usable = read_pixels(tree, split, decode, rows, workers, skips, on_step)
    skips.tell("are left out")
    return images if usable.all() else images[torch.from_numpy(usable)]


def read_pixels(
    tree: ImageTree,
    split: str,
    decode: DecodeConfig,
    rows: np.ndarray,
    workers: int | None,
    skips: Skips,
    on_step: OnStep = ignore,
) -> tuple[Tensor, np.ndarray]:
    """Decode one view of each of the images `rows` (rising) into memory.

    Returns uint8 (n, 3, size, size), undefined where an image is unusable, and bool (n,), which are usable.
    """
    images = torch.empty(len(rows), 3, decode.size, decode.size, dtype=torch.uint8)
    usable = np.zeros(len(rows), bool)
    done = 0
    for batch in decode_images(tree, split, decode, rows, workers=workers):
        places = np.searchsorted(rows, batch.indices)
        images[torch.from_numpy(places)] = batch.images
        usable[places] = True
        skips.add(batch.skipped)
        done += len(batch.requested)
        on_step(Step(done, len(rows), unit="images"))
    return images, usable


def _memory_limit(sharers: int) -> int:
    """Bytes that decoded images may take in each of `sharers` processes on this machine."""
    if hasattr(os, "sysconf") and {"SC_PAGE_SIZE", "SC_PHYS_PAGES"} <= os.sysconf_names.keys():
        return min(_MAX_BYTES, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4 // sharers)
    return _MAX_BYTES // sharers


def _place(images: Tensor, device: torch.device) -> Tensor:
    """Put images on the device, unless it is a GPU that they would fill."""
    if device.type == "cuda" and images.nbytes > _DEVICE_SHARE * torch.cuda.mem_get_info(device)[0]:
        return images
    return images.to(device)
