"""A split's codes on the device, and the batch of any step as a pure function of seed and step."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from varcli.data.batches import ShuffledOrder
from varcli.data.codes import CodesSplit
from varcli.errors import DataError

_AHEAD = 16_384  # samples whose rows are worked out and sent to the device at once
_MEMORY_SHARE = 0.25  # of the device's free memory that codes may take; beyond it they stay in the host's


class CodesSource:
    """Shuffled batches of codes and labels.

    An epoch visits every image once, in one of its stored views: the views of an image take turns, each image starting
    with another one. Sample number n of the whole run is the same for any batch size.
    """

    def __init__(self, split: CodesSplit, batch_size: int, seed: int, device: torch.device) -> None:
        if len(split.codes) == 0:
            raise DataError(
                "the codes cache holds no images to train on", "run `varcli tokenize` on a folder with images"
            )
        sources = split.sources.numpy()
        starts = np.flatnonzero(np.concatenate([[True], sources[1:] != sources[:-1]]))
        self.first_row = starts.astype(np.int64)
        self.num_views = np.diff(np.append(starts, len(sources))).astype(np.int64)
        self.first_view = np.random.default_rng(seed).integers(0, 2**31, len(starts))
        self.order = ShuffledOrder(len(starts), seed)
        self.batch_size, self.device = batch_size, device
        self.codes = _place(split.codes.view(torch.int16), device)  # torch hardly computes in uint16
        self.labels = split.labels.to(self.codes.device)
        self._ahead = max(1, min(_AHEAD, 4 * self.num_images) // batch_size)  # steps
        self._block: tuple[int, Tensor] = (-1, self.labels)

    @property
    def num_images(self) -> int:
        """Images, however many views each has."""
        return len(self.first_row)

    def rows(self, position: int, count: int) -> np.ndarray:
        """Rows of the split that samples [position, position + count) of the run are, int64."""
        images = self.order.indices(position, count)
        epochs = np.arange(position, position + count) // self.num_images
        return self.first_row[images] + (self.first_view[images] + epochs) % self.num_views[images]

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Return codes (B, L) and labels (B,), int64 on the device, of step `step`, counted from 0."""
        block, offset = divmod(step, self._ahead)
        if self._block[0] != block:
            rows = self.rows(block * self._ahead * self.batch_size, self._ahead * self.batch_size)
            self._block = (block, torch.from_numpy(rows).to(self.codes.device))
        return self._take(self._block[1][offset * self.batch_size : (offset + 1) * self.batch_size])

    def all_rows(self, batch_size: int, limit: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield codes and labels of all rows in order, or of `limit` spread evenly over them."""
        count = len(self.labels)
        rows = torch.arange(count)
        if limit is not None and limit < count:
            rows = rows[torch.linspace(0, count - 1, limit).round().long()]
        for chunk in rows.to(self.codes.device).split(batch_size):
            yield self._take(chunk)

    def _take(self, rows_B: Tensor) -> tuple[Tensor, Tensor]:
        codes = self.codes[rows_B].to(self.device, non_blocking=True)
        labels = self.labels[rows_B].to(self.device, non_blocking=True)
        return codes.long() & 0xFFFF, labels


def _place(codes: Tensor, device: torch.device) -> Tensor:
    """Put codes on the device if there is room for them and a model too, else in pinned memory."""
    if device.type != "cuda":
        return codes.to(device)
    free, _ = torch.cuda.mem_get_info(device)
    return codes.to(device) if codes.nbytes <= _MEMORY_SHARE * free else codes.pin_memory()
