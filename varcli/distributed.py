"""Several processes on one job, as torchrun starts them: who this one is, and waiting for the others.

A process that torchrun did not start is alone: rank 0 of 1, without a process group.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from varcli.errors import ConfigError

_TIMEOUT = timedelta(hours=2)  # one process may decode, hash or compute alone for long while the others wait


@dataclass(frozen=True)
class World:
    """The processes of one job."""

    rank: int = 0  # of this process
    size: int = 1  # processes

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes results and speaks."""
        return self.rank == 0

    def wait(self) -> None:
        """Return when every process has come here."""
        if self.size > 1:
            dist.barrier()

    def share(self, items: Sequence) -> Sequence:
        """Return this process's part of `items`: contiguous, all parts of nearly one length, together everything."""
        return items[len(items) * self.rank // self.size : len(items) * (self.rank + 1) // self.size]


ALONE = World()
"""The world of a process that nobody else works with."""


@contextmanager
def join_world(device: str = "auto") -> Iterator[tuple[World, str]]:
    """Join the processes that torchrun started, and leave them at the end.

    device: as in `varcli.devices.resolve_device`. Yields the world and the device of this process: with several GPUs each
    takes the one of its local rank. Messages go through gloo, which every machine has; results are exchanged in files.
    Raises ConfigError if torchrun's variables make no sense.
    """
    try:
        world = World(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    except ValueError as error:
        raise ConfigError(
            f"RANK, WORLD_SIZE and LOCAL_RANK must be whole numbers: {error}", "start with torchrun"
        ) from None
    if world.size == 1:
        yield world, device
        return
    if device in ("auto", "cuda") and torch.cuda.is_available():
        device = f"cuda:{local_rank % torch.cuda.device_count()}"
    dist.init_process_group("gloo", timeout=_TIMEOUT)
    try:
        yield world, device
    finally:
        dist.destroy_process_group()
