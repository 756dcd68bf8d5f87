"""Many samples as PNG files, encoded beside what draws them."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Self

import numpy as np

from varcli.data.png import save_png
from varcli.data.pool import TASKS_PER_WORKER, Task, WorkerPool
from varcli.errors import ShapeError

_TASK_BYTES = 2**22  # 21 images of 256 px: large beside the cost of a message, small beside the memory


class ImageSaver:
    """Writes images as PNG files, atomically, in other processes; where `num_workers` is 0, in this one.

        with ImageSaver(folder, 4) as saver:
            saver.save(["a.png", "b.png"], images)

    Files come in any order, and all are there when the context ends without an error. At most 8 MB of pixels a process
    are on their way; `save` waits for the rest, and raises what went wrong with earlier ones: ArtifactError for a file that
    cannot be written, DataError if a process was killed.
    """

    def __init__(self, folder: Path, num_workers: int) -> None:
        self.folder = Path(folder)
        self._pool = WorkerPool(num_workers) if num_workers > 0 else None
        self._pending: deque[Future[Any]] = deque()

    def __enter__(self) -> Self:
        if self._pool is not None:
            self._pool.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        try:
            if kind is None:
                self._wait(0)
        finally:
            if self._pool is not None:
                self._pool.__exit__(kind, *rest)

    def save(self, names: Sequence[str], images: Any) -> None:
        """Write images, uint8 (n, 3, H, W) on the host, as files of these names; they must not change until that is done."""
        pixels = np.ascontiguousarray(images)
        if pixels.ndim != 4 or pixels.shape[1] != 3 or pixels.dtype != np.uint8 or len(pixels) != len(names):
            raise ShapeError(f"{len(names)} images to save must be uint8 (n, 3, H, W), but are {pixels.shape}")
        if self._pool is None:
            for name, image in zip(names, pixels, strict=True):
                save_png(self.folder / name, image, durable=False, is_sample=True)
            return
        size = max(1, _TASK_BYTES // max(1, pixels[:1].nbytes))
        for start in range(0, len(names), size):
            self._wait(self._pool.num_workers * TASKS_PER_WORKER - 1)
            part, chosen = pixels[start : start + size], list(names[start : start + size])
            self._pending.append(
                self._pool.submit(
                    Task(
                        header={"do": "save", "folder": str(self.folder), "names": chosen, "shape": part.shape},
                        raw=memoryview(part).cast("B"),
                        paths=chosen,
                        advice="run the same command again: what was finished is kept; if the machine ran out of memory, use "
                        "fewer --workers",
                    )
                )
            )

    def _wait(self, most: int) -> None:
        """Wait until at most so many tasks are under way; raise the error of one that failed."""
        while self._pending and (len(self._pending) > most or self._pending[0].done()):
            self._pending.popleft().result()
