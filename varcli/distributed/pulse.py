"""Signs of life: each process leaves one in the job's store every second, so that a lost one can be named."""

from __future__ import annotations

import threading
import time

import torch.distributed as dist

_EVERY = 1.0  # seconds


class Pulse:
    """This process's signs of life, from now on until `stop`; a process that is stopped, hung up or dead leaves none."""

    def __init__(self, store: dist.Store, rank: int) -> None:
        self._store, self._rank = store, rank
        self._is_over = threading.Event()
        self._beat(0)  # now, so that whoever meets this process finds one
        threading.Thread(target=self._run, daemon=True).start()

    def stop(self) -> None:
        """Leave no more, so that the store may go."""
        self._is_over.set()

    def find_silent(self, size: int) -> list[int]:
        """Watch all `size` processes for three seconds; return the ranks that gave no sign of life."""
        keys = [_key(rank) for rank in range(size)]
        before = self._store.multi_get(keys)
        time.sleep(3 * _EVERY)
        after = self._store.multi_get(keys)
        return [rank for rank in range(size) if rank != self._rank and before[rank] == after[rank]]

    def _run(self) -> None:
        beats = 0
        while not self._is_over.wait(_EVERY):
            beats += 1
            try:
                self._beat(beats)
            except RuntimeError:
                return  # the store has gone, and the job with it

    def _beat(self, beats: int) -> None:
        self._store.set(_key(self._rank), str(beats))


def _key(rank: int) -> str:
    return f"varcli/pulse/{rank}"
