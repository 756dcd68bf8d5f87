"""What several processes that train one model have in common: batches cut evenly, mean gradients, mean numbers.

Each process computes a contiguous part of every batch with a copy of everything. Torch's DistributedDataParallel is not
used: a tokenizer's backward pass is begun at a leaf with a gradient put together from several losses, through a compiled
model, which its hooks do not see. A model of some hundred MB is averaged in a few large exchanges after the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from varcli.distributed import World
from varcli.errors import ConfigError

_BUCKET_BYTES = 64 * 2**20  # of gradients exchanged at once: few exchanges, and little memory beside the gradients


def share_batch(batch_size: int, world: World) -> int:
    """Return how many samples of a batch each process takes. Raises ConfigError if they cannot be divided evenly."""
    if batch_size % world.size:
        nearest = max(batch_size // world.size, 1) * world.size
        raise ConfigError(
            f"a batch of {batch_size:,} cannot be divided evenly among {world.size} processes",
            f"--batch-size counts the images of all of them; use e.g. {nearest}",
        )
    return batch_size // world.size


@torch.no_grad()
def average_gradients(parameters: Iterable[nn.Parameter], world: World) -> None:
    """Replace each parameter's gradient, of the mean loss of this process's part, by that of the whole batch.

    All processes must have gradients of the same parameters, as equal code gives them.
    """
    if world.size == 1:
        return
    for bucket in _buckets([parameter.grad for parameter in parameters if parameter.grad is not None]):
        mean = world.mean(torch.cat([gradient.flatten() for gradient in bucket]))
        pieces = mean.split([gradient.numel() for gradient in bucket])
        for gradient, piece in zip(bucket, pieces, strict=True):
            gradient.copy_(piece.view(gradient.shape))


def average_numbers(numbers: Mapping[str, Tensor], world: World) -> dict[str, Tensor]:
    """Replace 0-d tensors, each the mean of this process's part of a batch, by those of the whole batch."""
    if world.size == 1 or not numbers:
        return dict(numbers)
    means = world.mean(torch.stack([value.float() for value in numbers.values()]))
    return dict(zip(numbers, means.unbind(), strict=True))


def _buckets(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if bucket and size + tensor.nbytes > _BUCKET_BYTES:
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.nbytes
    if bucket:
        yield bucket
