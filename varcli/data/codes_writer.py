"""Writing a codes cache shard by shard, so that a killed job loses at most one and the same command goes on.

While it grows, `.plan.json` says what the cache will be and `.progress.jsonl` lists the finished shards; both go when
the manifest is there. Bytes depend on the plan, the images and the tokenizer alone, not on workers, batches or restarts.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from varcli.artifacts.lock import hold_folder
from varcli.artifacts.manifest import MANIFEST_NAME, FileEntry, Manifest, hash_file, write_manifest
from varcli.artifacts.verify import read_json, read_json_lines, read_manifest
from varcli.artifacts.write import append_json_line, prepare_folder, write_json, write_tensors, write_text
from varcli.config import to_dict
from varcli.data.paths import escape_path
from varcli.data.skips import allowed_skips
from varcli.data.views import DecodeConfig
from varcli.errors import ArtifactError, ConfigError, ShapeError, SkipLimitError

if TYPE_CHECKING:
    from torch import Tensor

    from varcli.data.images import ImageTree
    from varcli.data.stream import DecodedBatch

CODES_KIND = "codes"
SHARD_IMAGES = 4096  # images of one shard: what a kill can cost, RELIABILITY P1
_PLAN_NAME = ".plan.json"
_PROGRESS_NAME = ".progress.jsonl"
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


class CodesWriter(contextlib.AbstractContextManager["CodesWriter"]):
    """Write a codes cache into `out`; use as a context manager, which holds the folder's lock.

        with CodesWriter(out, plan, tree) as writer:
            for split in tree.splits:
                images = writer.missing(split)
                for batch in decode_images(tree, split, plan.decode[split], images, plan.views[split]):
                    writer.add(split, tokenizer.encode(...), batch)
            manifest = writer.finish()

    Entering resumes what is there; it raises ConfigError if that was begun with other settings, ArtifactError if `out`
    holds something else or cannot be written, LockedError if another process writes it.
    """

    def __init__(self, out: Path, plan: CodesPlan, tree: ImageTree) -> None:
        self.out = Path(out)
        self.plan = plan
        self.tree = tree
        self._listings = {
            name: "".join(f"{escape_path(path)}\n" for path in split.paths) for name, split in tree.splits.items()
        }
        self._settings = self._describe()
        self._done: dict[str, dict[int, dict[str, Any]]] = {name: {} for name in tree.splits}
        self._open: dict[str, dict[int, _OpenShard]] = {name: {} for name in tree.splits}
        self._stack = contextlib.ExitStack()
        self.finished: Manifest | None = None  # set when the cache is complete

    def __enter__(self) -> Self:
        self._stack.enter_context(hold_folder(self.out, {MANIFEST_NAME, _PLAN_NAME}, "codes cache"))
        try:
            self._resume()
            rows = sum(len(self.missing(name)) * self.plan.views[name] for name in self.tree.splits)
            prepare_folder(self.out, need_bytes=rows * (2 * self.plan.seq_len + 8))
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def missing(self, split: str) -> np.ndarray:
        """Return the positions of all images in shards that are not finished, int64, rising."""
        size, count = self.plan.shard_images, len(self.tree.splits[split])
        wanted = [number for number in range(self._num_shards(split)) if number not in self._done[split]]
        spans = [np.arange(number * size, min((number + 1) * size, count)) for number in wanted]
        return np.concatenate(spans).astype(np.int64) if spans and self.finished is None else np.empty(0, np.int64)

    def add(self, split: str, codes_BL: Tensor, batch: DecodedBatch) -> int:
        """Take the codes of one batch, which must follow the order of `missing`; whole shards go to disk.

        codes_BL: integers in [0, V), one row a row of `batch`. Returns the number of shards written.
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
        written = 0
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
                self._write_shard(split, int(number), self._open[split].pop(int(number)))
                written += 1
        return written

    def finish(self, max_skip: int | None = None) -> Manifest:
        """Write the manifest, which makes the cache whole, and return it.

        max_skip: images that may have been skipped; None allows 100 or 0.1 %, whichever is more. Raises SkipLimitError
        beyond it (the shards are kept: the same call with a larger limit succeeds), ArtifactError if a shard is missing.
        """
        if self.finished is not None:
            return self.finished
        for split in self.tree.splits:
            if len(self.missing(split)):
                raise ArtifactError(f"codes cache `{self.out}` is not complete yet", "run the same command again")
        info = {**self._settings, "source": str(self.tree.root), "splits": {}, "skipped": [], "converted": {}}
        known: dict[str, FileEntry] = {}
        skipped, converted = list(self.tree.skipped), Counter()
        for name, split in self.tree.splits.items():
            records = [self._done[name][number] for number in range(self._num_shards(name))]
            known.update({record["name"]: FileEntry(record["size"], record["sha256"]) for record in records})
            skipped.extend((path, reason) for record in records for path, reason in record["skipped"])
            for record in records:
                converted.update(record["converted"])
            info["splits"][name] = {
                "shards": [record["name"] for record in records],
                "rows": sum(record["rows"] for record in records),
                "images": len(split),
                "views": self.plan.views[name],
            }
        allowed = allowed_skips(self.tree.num_images, max_skip)
        if len(skipped) > allowed:
            path, reason = skipped[0]
            raise SkipLimitError(
                f"{len(skipped)} images were skipped, but at most {allowed} may be, e.g. "
                f"`{escape_path(path)}`: {reason}",
                f"mend or remove them, or run again with --max-skip {len(skipped)}: the finished shards are kept",
            )
        info["skipped"] = [{"path": path, "reason": reason} for path, reason in skipped]
        info["converted"] = dict(sorted(converted.items()))
        listings = [images_name(name) for name in self.tree.splits]
        self.finished = write_manifest(self.out, CODES_KIND, info, files=listings, known=known)
        self._forget_progress()
        return self.finished

    def _num_shards(self, split: str) -> int:
        return -(-len(self.tree.splits[split]) // self.plan.shard_images)

    def _describe(self) -> dict[str, Any]:
        plan, tree = self.plan, self.tree
        if set(plan.views) != set(tree.splits):
            raise ConfigError(f"the plan is for splits {sorted(plan.views)}, but the images have {sorted(tree.splits)}")
        digest = hashlib.sha256()
        for name, split in sorted(tree.splits.items()):
            digest.update(f"{name}\n{self._listings[name]}".encode())
            digest.update(split.labels.astype("<i4").tobytes())
        return {
            "tokenizer": plan.tokenizer,
            "patch_nums": list(plan.patch_nums),
            "vocab_size": plan.vocab_size,
            "code_channels": plan.code_channels,
            "image_size": plan.image_size,
            "downsampling": plan.downsampling,
            "classes": list(tree.classes),
            "views": max(plan.views.values()),
            "seed": next(iter(plan.decode.values())).seed,
            "augment": {
                name: {**to_dict(plan.decode[name]), "views": plan.views[name]} for name in sorted(plan.decode)
            },
            "images_digest": digest.hexdigest(),
            "shard_images": plan.shard_images,
        }

    def _resume(self) -> None:
        """Take over what an earlier run left, or begin."""
        if (self.out / MANIFEST_NAME).exists():
            manifest = read_manifest(self.out, CODES_KIND)
            self._require_same({key: manifest.info.get(key) for key in self._settings})
            self.finished = manifest
            self._forget_progress()
            return
        if (self.out / _PLAN_NAME).exists():
            self._require_same(read_json(self.out / _PLAN_NAME))
        else:
            write_json(self.out / _PLAN_NAME, self._settings)
        for name, listing in self._listings.items():
            write_text(self.out / images_name(name), listing)
        for record in read_json_lines(self.out / _PROGRESS_NAME):
            self._take(record)

    def _take(self, record: dict[str, Any]) -> None:
        """Count a shard as done if the file is still what the log says."""
        path = self.out / record["name"]
        entry = FileEntry(record["size"], record["sha256"])
        if record["split"] in self._done and path.is_file() and hash_file(path) == entry:
            self._done[record["split"]][record["shard"]] = record

    def _require_same(self, found: Mapping[str, Any]) -> None:
        changed = [key for key, value in self._settings.items() if found.get(key) != value]
        if changed:
            names = {"images_digest": "images", "augment": "crop or augmentation"}
            shown = ", ".join(names.get(key, key) for key in changed)
            raise ConfigError(
                f"codes cache `{self.out}` was begun with other settings: {shown} differ",
                "choose another --out, or delete that folder to start anew",
            )

    def _write_shard(self, split: str, number: int, shard: _OpenShard) -> None:
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
        append_json_line(self.out / _PROGRESS_NAME, record)
        self._done[split][number] = record

    def _forget_progress(self) -> None:
        for name in (_PLAN_NAME, _PROGRESS_NAME):
            (self.out / name).unlink(missing_ok=True)


def images_name(split: str) -> str:
    """Name of the file that lists a split's images."""
    return f"{split}-images.txt"


def begun_with(out: Path) -> str | None:
    """Return the fingerprint of the tokenizer that the cache in `out`, finished or not, was begun with; None if none was."""
    if (Path(out) / MANIFEST_NAME).exists():
        return str(read_manifest(Path(out), CODES_KIND).info["tokenizer"])
    if (Path(out) / _PLAN_NAME).exists():
        return str(read_json(Path(out) / _PLAN_NAME)["tokenizer"])
    return None
