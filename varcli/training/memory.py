"""What becomes of a training run when memory runs out: one error with what to change."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from varcli.distributed import World
from varcli.errors import MemoryLimitError, is_out_of_memory
from varcli.training.trainer import Trainer


@contextmanager
def memory_limits(trainer: Trainer, world: World) -> Iterator[None]:
    """Turn running out of memory into MemoryLimitError with the trainer's hint, and the process's number among several."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        device = trainer.parts.device
        peak = f", peak use {torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB" if device.type == "cuda" else ""
        where = f"process {world.rank} of {world.size}, counted from 0, is " if world.size > 1 else ""
        text = f"{where}out of memory at batch size {trainer.batch_size:,}{peak}"
        raise MemoryLimitError(text, trainer.memory_hint) from None
