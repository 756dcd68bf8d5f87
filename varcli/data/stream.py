"""Many images, in order, decoded by several processes, with a bounded amount of them in memory."""

from __future__ import annotations

import itertools
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from varcli.config import to_dict
from varcli.data.pool import TASKS_PER_WORKER, Answer, Task, WorkerPool, default_workers
from varcli.data.views import DecodeConfig
from varcli.data.worker import run_task
from varcli.errors import DataError, unknown_name

if TYPE_CHECKING:
    from torch import Tensor

    from varcli.data.images import ImageTree

_ROWS_PER_TASK = 32  # 6 MB of 256 px images: large beside the cost of a message, small beside the memory
_ADVICE = "if the machine ran out of memory, use fewer --workers; if it happens again, remove these images"

Result = tuple[dict[str, Any], np.ndarray]


@dataclass(frozen=True)
class DecodedBatch:
    """Some rows of the stream; a row is one view of one image."""

    images: Tensor  # uint8 (n, 3, size, size)
    indices: np.ndarray  # int64 (n,), positions in the split
    views: np.ndarray  # int64 (n,)
    labels: np.ndarray  # int64 (n,)
    requested: np.ndarray  # int64, positions of all images this batch stands for, with those that gave no row
    skipped: list[tuple[str, str]]  # (path, reason) of images that gave no row, in order
    skipped_indices: np.ndarray  # int64, their positions
    notes: list[tuple[int, list[str]]]  # (position, what was converted) of images that were not plain 8-bit RGB

    @property
    def converted(self) -> Counter[str]:
        """Images by what was converted, e.g. {"grey": 3}."""
        return Counter(note for _, notes in self.notes for note in notes)


def decode_images(
    tree: ImageTree,
    split: str,
    config: DecodeConfig,
    indices: Iterable[int] | None = None,
    views: int | Iterable[int] = 1,
    workers: int | None = None,
    batch_size: int = 256,
) -> Iterator[DecodedBatch]:
    """Decode images of one split in the order of `indices`, all views of an image one after the other.

    indices: positions in the split, all by default. views: how many views of each image, or their numbers.
    workers: processes; 0 decodes in this one, None chooses. batch_size: rows asked for at a time, rounded to whole
    images; skipped images make a batch shorter. Rows do not depend on workers or batch_size.
    Raises DataError for an unknown split, or if a worker is killed.
    """
    wanted = range(len(_split(tree, split))) if indices is None else indices
    return decode_spans(tree, split, config, [wanted], views, workers, batch_size)


def decode_spans(
    tree: ImageTree,
    split: str,
    config: DecodeConfig,
    spans: Iterable[Iterable[int]],
    views: int | Iterable[int] = 1,
    workers: int | None = None,
    batch_size: int = 256,
    pin: bool = False,
) -> Iterator[DecodedBatch]:
    """Decode several spans of positions in one go; no batch reaches over the end of a span.

    pin: put images where a GPU can fetch them by itself. The rest is as in `decode_images`.
    """
    numbers = tuple(range(views) if isinstance(views, int) else views)
    pairs = (((int(index), view) for index in span for view in numbers) for span in spans)
    return _decode(tree, split, config, pairs, workers, batch_size, max(1, len(numbers)), pin)


def decode_pairs(
    tree: ImageTree,
    split: str,
    config: DecodeConfig,
    pairs: Iterable[tuple[int, int]],
    workers: int | None = None,
    batch_size: int = 256,
) -> Iterator[DecodedBatch]:
    """Decode a stream of (index, view) pairs, which may be endless; the rest is as in `decode_images`.

    Neighbours with one index share its decoding.
    """
    return _decode(tree, split, config, [pairs], workers, batch_size, 1, False)


def _decode(
    tree: ImageTree,
    split: str,
    config: DecodeConfig,
    spans: Iterable[Iterable[tuple[int, int]]],
    workers: int | None,
    batch_size: int,
    unit: int,
    pin: bool,
) -> Iterator[DecodedBatch]:
    """Decode spans of pairs; `unit` rows belong to one image and stay in one task."""
    chosen = _split(tree, split)
    flips = np.isin(np.arange(len(tree.classes)), [tree.classes.index(name) for name in _flip_classes(tree, config)])
    batch_size = max(1, batch_size // unit) * unit
    chunks = _chunks(spans, batch_size, max(1, _ROWS_PER_TASK // unit) * unit)
    tasks = (_Task.build(tree.root, chosen, config, flips, rows, is_last) for rows, is_last in chunks)
    for batch in _group(_run(tasks, default_workers() if workers is None else workers)):
        yield _join(batch, chosen, config, pin)


@dataclass(frozen=True, kw_only=True)
class _Task(Task):
    """Some images to decode."""

    indices: list[int]  # positions in the split
    is_last: bool  # a batch ends with them

    @classmethod
    def build(
        cls,
        root: Path,
        split: Any,
        config: DecodeConfig,
        flips: np.ndarray,
        rows: list[tuple[int, int]],
        is_last: bool,
    ) -> _Task:
        indices, images = [], []
        for index, group in itertools.groupby(rows, key=lambda pair: pair[0]):
            indices.append(index)
            images.append((split.paths[index], [int(view) for _, view in group], bool(flips[split.labels[index]])))
        pixels = None if split.pixels is None else split.pixels[indices]
        header = {
            "do": "decode",
            "config": to_dict(config),
            "root": str(root),
            "shape": None if pixels is None else pixels.shape,
            "images": images,
        }
        paths = [path for path, _, _ in images]
        raw = b"" if pixels is None else pixels.tobytes()
        return cls(header=header, raw=raw, paths=paths, advice=_ADVICE, indices=indices, is_last=is_last)


def _split(tree: ImageTree, name: str) -> Any:
    if name not in tree.splits:
        raise unknown_name("split", name, tree.splits, DataError)
    return tree.splits[name]


def _flip_classes(tree: ImageTree, config: DecodeConfig) -> tuple[str, ...]:
    for name in config.flip_classes:
        if name not in tree.classes:
            raise unknown_name("class", name, tree.classes, DataError)
    return config.flip_classes


def _chunks(
    spans: Iterable[Iterable[tuple[int, int]]], batch_size: int, task_size: int
) -> Iterator[tuple[list[tuple[int, int]], bool]]:
    """Cut spans into tasks, and say of each whether a batch ends with it: a full one, or the last of a span."""
    for span in spans:
        stream, left = iter(span), batch_size
        rows = list(itertools.islice(stream, min(task_size, left)))
        while rows:
            left = left - len(rows) or batch_size
            following = list(itertools.islice(stream, min(task_size, left)))
            yield rows, not following or left == batch_size
            rows = following


def _group(results: Iterator[tuple[_Task, Result]]) -> Iterator[list[tuple[_Task, Result]]]:
    batch = []
    for task, result in results:
        batch.append((task, result))
        if task.is_last:
            yield batch
            batch = []


def _join(batch: list[tuple[_Task, Result]], split: Any, config: DecodeConfig, pin: bool) -> DecodedBatch:
    import torch

    indices, views, requested, skipped, skipped_indices, notes = [], [], [], [], [], []
    for task, (header, _) in batch:
        requested.extend(task.indices)
        skipped_indices.extend(task.indices[number] for number, _ in header["skipped"])
        indices.extend(task.indices[number] for number, _ in header["rows"])
        views.extend(view for _, view in header["rows"])
        skipped.extend((task.paths[number], reason) for number, reason in header["skipped"])
        notes.extend((task.indices[number], found) for number, found in header["notes"])
    images = torch.empty(len(indices), 3, config.size, config.size, dtype=torch.uint8, pin_memory=pin)
    np.concatenate([pixels for _, (_, pixels) in batch], out=images.numpy())
    where = np.asarray(indices, np.int64)
    return DecodedBatch(
        images=images,
        indices=where,
        views=np.asarray(views, np.int64),
        labels=split.labels[where].astype(np.int64),
        requested=np.asarray(requested, np.int64),
        skipped=skipped,
        skipped_indices=np.asarray(skipped_indices, np.int64),
        notes=notes,
    )


def _run(tasks: Iterator[_Task], num_workers: int) -> Iterator[tuple[_Task, Result]]:
    """Run tasks and yield results in order."""
    if num_workers <= 0:
        yield from ((task, run_task(task.header, bytes(task.raw))) for task in tasks)
        return
    pending: deque[tuple[_Task, Future[Answer]]] = deque()
    with WorkerPool(num_workers) as pool:
        for task in tasks:
            pending.append((task, pool.submit(task)))
            if len(pending) >= num_workers * TASKS_PER_WORKER:
                yield _finish(*pending.popleft())
        while pending:
            yield _finish(*pending.popleft())


def _finish(task: _Task, future: Future[Answer]) -> tuple[_Task, Result]:
    header, raw = future.result()
    size = task.header["config"]["size"]
    return task, (header, np.frombuffer(raw, np.uint8).reshape(-1, 3, size, size))
