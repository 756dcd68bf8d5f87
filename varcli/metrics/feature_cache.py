"""Features kept on disk: computed once for a set of images and a network, in shards that a rerun or another rank skips.

A folder of the cache is named by a hash of everything that moves the numbers. While it grows it holds shards of
`SHARD_IMAGES` rows; when all are there they are joined into one array a part, which is mapped, not read, and the manifest
makes it whole. Deleting a folder, or all of them, costs time only.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from varcli.artifacts.fetch import cache_folder
from varcli.artifacts.lock import hold_folder
from varcli.artifacts.manifest import MANIFEST_NAME, digest_json, write_manifest
from varcli.artifacts.verify import read_manifest, read_tensors, verify_folder
from varcli.artifacts.write import atomic_path, prepare_folder, write_json, write_tensors
from varcli.distributed import World
from varcli.errors import ArtifactError

KIND = "features-cache"
SHARD_IMAGES = 1024  # rows of a shard: what a kill can cost; batches are powers of two, so none crosses a border
_SETTINGS_NAME = ".settings.json"
_SIGNS = {_SETTINGS_NAME, MANIFEST_NAME}

RowReader = Callable[[int, int], Iterator[Mapping[str, Tensor]]]
"""Called with the first row and the one after the last; yields batches, name -> rows, in order."""


def default_cache() -> Path:
    """Return where features are kept if the user says nothing."""
    return cache_folder() / "features"


def align_batch(batch_size: int) -> int:
    """Return the largest power of two up to `batch_size` and a shard's size."""
    return min(SHARD_IMAGES, 1 << (max(1, batch_size).bit_length() - 1))


class FeatureCache:
    """One set of images through one network.

    settings: JSON values that decide the numbers. count: rows. Several ranks of one job may share it: each computes the
    shards of `missing`, then all call `finish`.
    """

    def __init__(self, root: Path, settings: Mapping[str, Any], count: int) -> None:
        self.settings, self.count = dict(settings), count
        self.folder = root / digest_json(self.settings)[:32]

    def load(self) -> dict[str, np.ndarray] | None:
        """Return the arrays, mapped from disk, if they are all there and as they were written; else None."""
        if not (self.folder / MANIFEST_NAME).is_file():
            return None
        try:
            manifest = read_manifest(self.folder, KIND)
            if not verify_folder(self.folder, manifest):
                return {
                    name.removesuffix(".npy"): np.load(self.folder / name, mmap_mode="c", allow_pickle=False)
                    for name in manifest.files
                }
        except (ArtifactError, ValueError):
            pass
        return None  # damaged, so computed again

    def compute(self, rows: RowReader, world: World) -> dict[str, np.ndarray]:
        """Compute what is missing, join it, and return the arrays. Every rank of `world` must call this."""
        with hold_folder(self.folder, _SIGNS, "features") if world.is_first else contextlib.nullcontext():
            if world.is_first:
                (self.folder / MANIFEST_NAME).unlink(missing_ok=True)
                write_json(self.folder / _SETTINGS_NAME, self.settings)
            world.wait()
            wanted = world.share(self.missing())
            world.wait()  # nobody writes before everybody has looked
            self._compute_shards(wanted, rows)
            world.wait()
            if world.is_first:
                self._join()
        world.wait()
        arrays = self.load()
        if arrays is None:
            raise ArtifactError(
                f"the features just written to `{self.folder}` cannot be read back", "is the disk sound?"
            )
        return arrays

    def missing(self) -> list[int]:
        """Return the numbers of the shards that are not there yet."""
        return [number for number in range(self._num_shards) if not self._shard(number).is_file()]

    @property
    def _num_shards(self) -> int:
        return -(-self.count // SHARD_IMAGES)

    def _shard(self, number: int) -> Path:
        return self.folder / f"rows-{number:06d}.safetensors"

    def _compute_shards(self, wanted: Iterable[int], rows: RowReader) -> None:
        for first, stop in _runs(wanted):
            number, batches, done = first, [], 0
            for batch in rows(first * SHARD_IMAGES, min(stop * SHARD_IMAGES, self.count)):
                batches.append(batch)
                done += len(next(iter(batch.values())))
                if done == min(SHARD_IMAGES, self.count - number * SHARD_IMAGES):
                    write_tensors(self._shard(number), join_batches(batches))
                    number, batches, done = number + 1, [], 0

    def _join(self) -> None:
        """Turn the shards into one array a part, and the manifest that makes them whole."""
        first = read_tensors(self._shard(0))
        prepare_folder(
            self.folder, need_bytes=sum(tensor[:1].nbytes * self.count for tensor in first.values()), sweep=False
        )
        for name, example in first.items():
            shape = (self.count, *example.shape[1:])
            with atomic_path(self.folder / f"{name}.npy") as temporary:
                target = np.lib.format.open_memmap(temporary, "w+", example.numpy().dtype, shape)
                for number in range(self._num_shards):
                    rows = read_tensors(self._shard(number))[name].numpy()
                    target[number * SHARD_IMAGES : number * SHARD_IMAGES + len(rows)] = rows
                target.flush()
                del target
        write_manifest(self.folder, KIND, self.settings, [f"{name}.npy" for name in first])
        for number in range(self._num_shards):
            self._shard(number).unlink()
        (self.folder / _SETTINGS_NAME).unlink(missing_ok=True)


def join_batches(batches: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Put batches, name -> rows, one after the other."""
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


def _runs(numbers: Iterable[int]) -> list[tuple[int, int]]:
    """Join rising numbers into runs (first, last + 1)."""
    runs: list[tuple[int, int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number:
            runs[-1] = (runs[-1][0], number + 1)
        else:
            runs.append((number, number + 1))
    return runs
