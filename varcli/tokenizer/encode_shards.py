"""The shards of a codes cache, encoded by one process or shared by several, with nothing waiting for anything else."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Self

import torch

from varcli.artifacts.manifest import Manifest
from varcli.data.codes_shards import CodesPlan, ShardWriter, shard_positions
from varcli.data.codes_writer import CodesWriter
from varcli.data.images import ImageTree
from varcli.data.stream import DecodedBatch, decode_spans
from varcli.distributed import World
from varcli.errors import ConfigError
from varcli.progress import OnStep, Step
from varcli.tokenizer.batch_encoder import BatchEncoder, CodesOnTheWay

_IN_FLIGHT = 2  # batches that the device may be behind: enough for it never to wait, little memory


class SharedCache(contextlib.AbstractContextManager["SharedCache"]):
    """A codes cache that all processes of a world write: the first holds the folder, each has shards of its own.

    Entering raises as `CodesWriter`, and ConfigError if the processes do not see the same images or settings.
    """

    def __init__(self, out: Path, plan: CodesPlan, tree: ImageTree, world: World) -> None:
        self.plan, self.tree, self.world = plan, tree, world
        # each process knows what the cache will be, but only the first one's touches the folder
        self._whole = CodesWriter(out, plan, tree)
        self.writer = self._whole if world.is_first else None
        self.shards: CodesWriter | ShardWriter = self.writer or ShardWriter(out, plan, tree, world.rank)
        self.missing: list[tuple[str, int]] = []  # (split, shard) of all processes

    def __enter__(self) -> Self:
        parts = [int(self._whole.digest[start : start + 12], 16) for start in (0, 12)]
        if self.world.largest(*parts, *(-part for part in parts)) != [*parts, *(-part for part in parts)]:
            raise ConfigError(
                "the processes do not see the same images or settings",
                "give every machine the same folder of images, tokenizer and options",
            )
        with contextlib.ExitStack() as stack:
            if self.writer is not None:
                stack.enter_context(self.writer)
            self.missing = self._agree_on_missing()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    @property
    def has_work(self) -> bool:
        """Whether any process has shards to write."""
        return bool(self.missing)

    def own(self) -> dict[str, list[int]]:
        """Return the shards that this process writes, for each split."""
        shared: dict[str, list[int]] = {}
        for split, shard in self.world.share(self.missing):
            shared.setdefault(split, []).append(shard)
        return shared

    def finish(self, max_skip: int | None) -> Manifest | None:
        """Wait for all processes, and have the first one make the cache whole; None on the others."""
        self.world.wait()
        if self.writer is None:
            return None
        if self.world.size > 1:
            self.writer.collect()
        return self.writer.finish(max_skip)

    def _agree_on_missing(self) -> list[tuple[str, int]]:
        splits = list(self.tree.splits)
        found = []
        if self.writer is not None:
            found = [
                (number, shard) for number, split in enumerate(splits) for shard in self.writer.missing_shards(split)
            ]
        pairs = torch.zeros(self.world.largest(len(found))[0], 2, dtype=torch.int64)
        if found:
            pairs = torch.tensor(found)
        self.world.copy_first(pairs)
        return [(splits[number], shard) for number, shard in pairs.tolist()]


def encode_shards(encoder: BatchEncoder, cache: SharedCache, workers: int | None, on_step: OnStep) -> None:
    """Decode, encode and write this process's shards.

    Processes decode ahead, the device computes, its codes come back by themselves, and a thread checks, hashes and writes
    them; this thread only hands over, and is never more than two batches ahead of the device.
    """
    own = cache.own()
    whole = cache.world.size * sum(
        len(shard_positions(cache.plan, cache.tree, split, shard)) * cache.plan.views[split]
        for split, shards in own.items()
        for shard in shards
    )  # all processes have nearly as many
    done = 0
    waiting: deque[tuple[Future[None], int]] = deque()

    def write(split: str, codes: CodesOnTheWay, batch: DecodedBatch) -> None:
        cache.shards.add(split, codes.wait(), batch)

    def settle(leave: int) -> None:
        nonlocal done
        while len(waiting) > leave:
            future, rows = waiting.popleft()
            future.result()
            done += rows * cache.world.size
            on_step(Step(done, whole, unit="views"))

    with ThreadPoolExecutor(1) as thread:
        try:
            for split, batch in _batches(encoder, cache, own, workers):
                codes = encoder.begin(batch.images)
                rows = len(batch.requested) * cache.plan.views[split]
                waiting.append((thread.submit(write, split, codes, batch), rows))
                settle(_IN_FLIGHT)
            settle(0)
        finally:
            for future, _ in waiting:
                future.cancel()


def _batches(
    encoder: BatchEncoder, cache: SharedCache, own: dict[str, list[int]], workers: int | None
) -> Iterator[tuple[str, DecodedBatch]]:
    for split, shards in own.items():
        stream = decode_spans(
            cache.tree,
            split,
            cache.plan.decode[split],
            (shard_positions(cache.plan, cache.tree, split, shard) for shard in shards),
            cache.plan.views[split],
            workers,
            encoder.batch_size,
            pin=encoder.device.type == "cuda",
        )
        with contextlib.closing(stream):
            for batch in stream:
                yield split, batch
