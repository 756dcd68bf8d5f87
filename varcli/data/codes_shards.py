"""What a codes cache is made of: the plan that decides its bytes, and shards, which several processes may write."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from varcli.artifacts.manifest import hash_file
from varcli.artifacts.write import append_json_line, write_tensors
from varcli.data.views import DecodeConfig
from varcli.errors import ConfigError, ShapeError

if TYPE_CHECKING:
    from torch import Tensor

    from varcli.data.images import ImageTree
    from varcli.data.stream import DecodedBatch

SHARD_IMAGES = 4096  # images of one shard: what a kill can cost each process, RELIABILITY P1
PLAIN_PRECISION = "fp32"  # of the codes that everything else is compared with
PROGRESS_PATTERN = ".progress*.jsonl"  # of the logs of finished shards, one a process
_MAX_VOCAB = 2**16


@dataclass(frozen=True, kw_only=True)
class CodesPlan:
    """Everything but the images that decides the bytes of a cache."""

    tokenizer: str  # fingerprint
    patch_nums: tuple[int, ...]
    vocab_size: int
    code_channels: int
    downsampling: int  # pixels of an image side for one of the latent grid
    decode: Mapping[str, DecodeConfig]  # for each split
    views: Mapping[str, int]  # stored views of an image, for each split
    shard_images: int = SHARD_IMAGES
    precision: str = PLAIN_PRECISION  # in which the encoder computes

    def __post_init__(self) -> None:
        if not 1 <= self.vocab_size <= _MAX_VOCAB:
            raise ConfigError(f"codes are stored in 16 bits, so vocab_size must be in [1, 65536]: {self.vocab_size}")
        if self.shard_images < 1 or any(count < 1 for count in self.views.values()):
            raise ConfigError("shard_images and views must be at least 1")
        if set(self.views) != set(self.decode) or len({config.size for config in self.decode.values()}) != 1:
            raise ConfigError("decode and views need one entry for each split, and all the same size")

    @property
    def image_size(self) -> int:
        """Side of the images the tokenizer reads, in pixels."""
        return next(iter(self.decode.values())).size

    @property
    def seq_len(self) -> int:
        """L, the codes of one image."""
        return sum(side * side for side in self.patch_nums)


@dataclass
class _OpenShard:
    """Rows of the shard that is being filled."""

    codes: list[np.ndarray] = field(default_factory=list)
    labels: list[np.ndarray] = field(default_factory=list)
    sources: list[np.ndarray] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    seen: int = 0  # images, with those that gave no row
    converted: Counter[str] = field(default_factory=Counter)


def shard_positions(plan: CodesPlan, tree: ImageTree, split: str, shard: int) -> np.ndarray:
    """Return the positions in the split of a shard's images, int64, rising."""
    size = plan.shard_images
    return np.arange(shard * size, min((shard + 1) * size, len(tree.splits[split])), dtype=np.int64)


class ShardWriter:
    """Fill shards of a cache and write each when it is whole.

    Processes that share a cache each have one, for other shards; only the one with the `CodesWriter` holds the folder.
    rank: of this process among them.
    """

    def __init__(self, out: Path, plan: CodesPlan, tree: ImageTree, rank: int = 0) -> None:
        self.out = Path(out)
        self.plan = plan
        self.tree = tree
        self._log_name = f".progress-{rank}.jsonl" if rank else ".progress.jsonl"
        self._open: dict[str, dict[int, _OpenShard]] = {name: {} for name in tree.splits}

    def add(self, split: str, codes_BL: Tensor, batch: DecodedBatch) -> list[dict[str, Any]]:
        """Take the codes of one batch, which must follow the order of positions in each shard; whole shards go to disk.

        codes_BL: integers in [0, V), one row a row of `batch`. Returns the log's records of the shards written.
        Raises ShapeError if they do not fit, ArtifactError if the disk is full.
        """
        codes = codes_BL.detach().cpu().numpy()
        if codes.shape != (len(batch.indices), self.plan.seq_len):
            wanted = (len(batch.indices), self.plan.seq_len)
            raise ShapeError(f"codes_BL must have shape {wanted}, but has {codes.shape}")
        if codes.size and not 0 <= codes.min() <= codes.max() < self.plan.vocab_size:
            raise ShapeError(
                f"codes_BL must be in [0, {self.plan.vocab_size}), but go from {codes.min()} to {codes.max()}"
            )
        size = self.plan.shard_images
        numbers = batch.indices // size
        written = []
        for number in np.unique(batch.requested // size):
            shard = self._open[split].setdefault(int(number), _OpenShard())
            rows = numbers == number
            shard.codes.append(codes[rows].astype(np.uint16))
            shard.labels.append(batch.labels[rows].astype(np.int32))
            shard.sources.append(batch.indices[rows].astype(np.int32))
            shard.skipped.extend(
                skip
                for skip, index in zip(batch.skipped, batch.skipped_indices, strict=True)
                if index // size == number
            )
            shard.seen += int((batch.requested // size == number).sum())
            for index, notes in batch.notes:
                shard.converted.update(notes if index // size == number else ())
            if shard.seen == min(size, len(self.tree.splits[split]) - int(number) * size):
                written.append(self._write_shard(split, int(number), self._open[split].pop(int(number))))
        return written

    def _write_shard(self, split: str, number: int, shard: _OpenShard) -> dict[str, Any]:
        import torch

        name = f"{split}-{number:05d}.safetensors"
        tensors = {"codes": shard.codes, "labels": shard.labels, "sources": shard.sources}
        write_tensors(self.out / name, {key: torch.from_numpy(np.concatenate(rows)) for key, rows in tensors.items()})
        entry = hash_file(self.out / name)
        record = {
            "split": split,
            "shard": number,
            "name": name,
            "size": entry.size,
            "sha256": entry.sha256,
            "rows": sum(len(rows) for rows in shard.labels),
            "skipped": shard.skipped,
            "converted": dict(sorted(shard.converted.items())),
        }
        append_json_line(self.out / self._log_name, record)
        return record
