"""Images for training in any number: decoded ahead of the device by other processes, with a bounded number in memory."""

from __future__ import annotations

import itertools
import queue
import threading
from collections import deque
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from varcli.data.batches import ShuffledOrder
from varcli.data.images import ImageTree
from varcli.data.paths import escape_path
from varcli.data.skips import Skips
from varcli.data.stream import DecodedBatch, decode_pairs
from varcli.data.views import DecodeConfig
from varcli.errors import DataError

_AHEAD = 3  # batches that wait for the device, beside those being decoded
_CHUNK = 256  # images of `spread` decoded at a time
_PATIENCE = 0.1  # seconds after which the thread looks whether it is still wanted

STAND_IN = "others stand in for them"  # as `Skips.tell` says it

Pair = tuple[int, int]  # place in the split, number of the view


class PixelStream:
    """The images of a split, decoded when they are wanted, shuffled anew each epoch with a new crop of each.

    A `varcli.training.pixels.ImageSource`. Sample number n of a run over N images is view n // N of its image, so
    it depends on seed and position alone, not on workers, batches or where a run was stopped. An image that cannot be
    used has the next usable one of the listing in its place. Batches are decoded ahead on the guess that the next
    position is as far off as the last one was, at first a batch; another one is right too, and costs a new start of the
    workers.

    config: how to cut training images. batch_size: samples of a whole batch, of which the caller may take a part: how far
    apart its parts are, and how many images there must be (`require_batch`).
    skips: notes unusable images; the first ones are told by `batch` or `spread`. Call `close` at the end.
    Raises DataError if no image can be used, SkipLimitError if too many cannot, here or later.
    """

    def __init__(
        self,
        tree: ImageTree,
        split: str,
        config: DecodeConfig,
        *,
        batch_size: int = 1,
        seed: int = 0,
        device: torch.device | None = None,
        workers: int | None = None,
        skips: Skips | None = None,
    ) -> None:
        self.tree, self.split, self.config, self.workers = tree, split, config, workers
        self.device = torch.device("cpu") if device is None else device
        self.skips = Skips(tree) if skips is None else skips
        self.order = ShuffledOrder(max(1, len(tree.splits[split])), seed)
        self._batch_size = batch_size
        self._unusable: set[int] = set()  # places, as far as known; grows in the thread that decodes
        self._has_told = False
        self._reader: _Reader | None = None
        self._last: Pair | None = None  # position and count of the last batch
        self._stride = 0  # from one batch to the next
        self.spread(1)  # a folder of broken files is found here and not after a run has begun

    def __len__(self) -> int:
        return len(self.tree.splits[self.split])

    def rows(self, position: int, count: int) -> list[int]:
        """Places of samples [position, position + count) of the run; of stand-ins where they are known to be needed."""
        return [index for index, _ in self._pairs(position, count)]

    def batch(self, position: int, count: int) -> Tensor:
        """Samples [position, position + count) of the run: uint8 (count, 3, H, W), on the device."""
        last, self._last = self._last, (position, count)
        if self._reader is None or last is None or (last[0] + self._stride, last[1]) != (position, count):
            self.close()
            goes_on = last is not None and last[1] == count and last[0] < position
            self._stride = position - last[0] if last is not None and goes_on else max(count, self._batch_size)
            pin = self.device.type == "cuda"
            self._reader = _Reader(self._batches(position, count, self._stride, pin))
        try:
            images = self._reader.take()
            require_batch(len(self) - len(self._unusable), len(self), self._batch_size, self.skips)
        except BaseException:
            self.close()
            raise
        self._tell_first()
        return images.to(self.device, non_blocking=True)

    def spread(self, count: int) -> Tensor:
        """Up to `count` images, evenly spread over all and cut in the centre: uint8 (n, 3, H, W), on the device."""
        pairs = [(int(index), 0) for index in spread_rows(len(self), count)]
        cut = replace(self.config, crop="center") if self.config.crop == "random" else self.config
        workers = 0 if len(pairs) < 64 else self.workers  # starting processes takes longer than that
        images = torch.empty(len(pairs), 3, cut.size, cut.size, dtype=torch.uint8)
        stream = decode_pairs(self.tree, self.split, cut, pairs, workers, _CHUNK)
        for start, batch in zip(range(0, len(pairs), _CHUNK), stream, strict=True):
            images[start : start + _CHUNK] = self._complete(pairs[start : start + _CHUNK], batch, cut)
        self._tell_first()
        return images.to(self.device)

    def close(self) -> None:
        """End the processes and the thread; the next `batch` starts others."""
        if self._reader is not None:
            self._reader.close()
        self._reader = None

    def _tell_first(self) -> None:
        """Say once that images cannot be used; `open_pixels` says at the end how many more there were."""
        if self._unusable and not self._has_told:
            self.skips.tell(STAND_IN)
            self._has_told = True

    def _pairs(self, position: int, count: int) -> list[Pair]:
        epochs = np.arange(position, position + count) // len(self)
        indices = self.order.indices(position, count)
        return [(self._usable(int(index)), int(epoch)) for index, epoch in zip(indices, epochs, strict=True)]

    def _usable(self, index: int) -> int:
        """The place itself, or the next one that is not known to be unusable."""
        while index in self._unusable:
            index = (index + 1) % len(self)
        return index

    def _batches(self, position: int, count: int, stride: int, pin: bool) -> Generator[Tensor, None, None]:
        """Decode batches without end; runs in the reader's thread."""
        asked: deque[list[Pair]] = deque()  # of the batches that are being decoded

        def pairs() -> Iterator[Pair]:
            for start in itertools.count(position, stride):
                asked.append(self._pairs(start, count))
                yield from asked[-1]

        with closing(decode_pairs(self.tree, self.split, self.config, pairs(), self.workers, count)) as stream:
            for batch in stream:
                images = self._complete(asked.popleft(), batch, self.config)
                yield images.pin_memory() if pin else images

    def _complete(self, asked: list[Pair], batch: DecodedBatch, config: DecodeConfig) -> Tensor:
        """The images of all pairs of a batch: where one could not be used, its stand-in, decoded here."""
        found = [*zip(batch.indices.tolist(), batch.views.tolist(), strict=True)]
        if found == asked:
            return batch.images
        images = torch.empty(len(asked), 3, config.size, config.size, dtype=torch.uint8)
        missing = list(range(len(asked)))
        while missing:
            self._note(batch)
            got = iter(found)
            following = next(got, None)
            left, placed = [], []
            for place in missing:
                if asked[place] == following:
                    placed.append(place)
                    following = next(got, None)
                else:
                    left.append(place)
            images[placed] = batch.images
            if left:
                asked = [(self._usable(index), view) for index, view in asked]
                wanted = [asked[place] for place in left]
                batch = next(decode_pairs(self.tree, self.split, config, wanted, 0, len(wanted)))
                found = [*zip(batch.indices.tolist(), batch.views.tolist(), strict=True)]
            missing = left
        return images

    def _note(self, batch: DecodedBatch) -> None:
        """Remember a batch's unusable images. Raises DataError if none is left."""
        lost = dict(zip(batch.skipped_indices.tolist(), batch.skipped, strict=True))
        fresh = {index: skip for index, skip in lost.items() if index not in self._unusable}
        self._unusable |= fresh.keys()
        self.skips.add(fresh.values())
        require_batch(len(self) - len(self._unusable), len(self), 1, self.skips)


class _Reader:
    """A thread that keeps the next few batches ready, so that the device does not wait."""

    def __init__(self, batches: Generator[Tensor, None, None]) -> None:
        self._ready: queue.Queue[Tensor | BaseException] = queue.Queue(_AHEAD)
        self._is_over = threading.Event()
        # daemon: an interpreter that ends without `close` does not wait for it
        self._thread = threading.Thread(target=self._fill, args=(batches,), daemon=True)
        self._thread.start()

    def take(self) -> Tensor:
        """Wait for the next batch. Raises what went wrong in the thread."""
        item = self._ready.get()
        if isinstance(item, BaseException):
            raise item
        return item

    def close(self) -> None:
        """Stop the thread, which ends the processes it started."""
        self._is_over.set()
        self._thread.join()

    def _fill(self, batches: Generator[Tensor, None, None]) -> None:
        with closing(batches):
            try:
                for batch in batches:
                    if not self._put(batch):
                        return
            except BaseException as error:  # noqa: BLE001 - raised by `take` in the thread that asked
                self._put(error)

    def _put(self, item: Tensor | BaseException) -> bool:
        while not self._is_over.is_set():
            try:
                self._ready.put(item, timeout=_PATIENCE)
            except queue.Full:
                continue
            return True
        return False


def spread_rows(total: int, count: int) -> np.ndarray:
    """Return up to `count` of `total` places, evenly spread from the first to the last: int64, rising."""
    return np.linspace(0, total - 1, min(count, total)).round().astype(np.int64)


def require_batch(usable: int, total: int, batch_size: int, skips: Skips | None = None) -> None:
    """Raise DataError unless `usable` of `total` training images fill a batch."""
    if usable >= max(1, batch_size):
        return
    reason = ""
    if skips is not None and skips.found:
        reason = f", e.g. `{escape_path(skips.found[-1][0])}`: {skips.found[-1][1]}"
    if not usable:
        raise DataError(f"none of the {total:,} images to train on can be used{reason}", "pass a folder with images")
    hint = "use a smaller --batch-size or more images"
    if usable < total:
        raise DataError(
            f"at most {usable:,} of the {total:,} images to train on can be used, fewer than one batch of {batch_size:,}"
            f"{reason}",
            hint,
        )
    raise DataError(f"there are {total:,} images to train on, fewer than one batch of {batch_size:,}", hint)
