"""The images a tokenizer learns from: the batch of any step as a pure function of seed and step."""

from __future__ import annotations

import torch
from torch import Tensor

from varcli.data.batches import ShuffledOrder
from varcli.data.defaults import default_decode
from varcli.data.images import ImageTree
from varcli.data.stream import decode_images
from varcli.errors import DataError
from varcli.progress import OnStep, Step, ignore

_MAX_BYTES = 8 * 2**30  # decoded images are kept in memory up to this size


class Pixels:
    """Decoded images on a device, shuffled anew each epoch.

    images: uint8 (N, 3, H, W).
    """

    def __init__(self, images: Tensor, seed: int = 0) -> None:
        self.images = images
        self.order = ShuffledOrder(max(1, len(images)), seed)

    def __len__(self) -> int:
        return len(self.images)

    def rows(self, position: int, count: int) -> list[int]:
        """Places of samples [position, position + count) of the run."""
        return [int(row) for row in self.order.indices(position, count)]

    def batch(self, position: int, count: int) -> Tensor:
        """Samples [position, position + count) of the run: uint8 (count, 3, H, W)."""
        picks = torch.as_tensor(self.order.indices(position, count), device=self.images.device)
        return self.images[picks]

    def spread(self, count: int) -> Tensor:
        """Up to `count` images, evenly spread over all: uint8 (n, 3, H, W)."""
        return self.images[:: max(1, len(self.images) // count)][:count]


def read_pixels(tree: ImageTree, split: str, size: int, on_step: OnStep = ignore) -> Tensor:
    """Decode a whole split into memory: uint8 (N, 3, size, size), one view an image.

    Raises DataError if that would take more than 8 GiB.
    """
    count = len(tree.splits[split])
    if count * 3 * size * size > _MAX_BYTES:
        raise DataError(
            f"{count:,} images of {size} px take {count * 3 * size * size / 2**30:.0f} GiB decoded, more than the 8 GiB "
            "a tokenizer's training keeps in memory",
            "train the tokenizer on a part of them",
        )
    parts, done = [], 0
    for batch in decode_images(tree, split, default_decode(tree, size)[split]):
        parts.append(batch.images)
        done += len(batch.requested)
        on_step(Step(done, count, unit="images"))
    return torch.cat(parts) if parts else torch.zeros(0, 3, size, size, dtype=torch.uint8)
