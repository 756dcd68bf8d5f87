"""Writing a codes cache shard by shard, so that a killed job loses at most one and the same command goes on.

While it grows, `.plan.json` says what the cache will be and `.progress.jsonl` lists the finished shards (those of further
processes are in logs beside it); all go when the manifest is there. Bytes depend on the plan, the images and the tokenizer
alone, not on workers, batches, processes or restarts.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from varcli import config as configs
from varcli.artifacts.lock import hold_folder
from varcli.artifacts.manifest import (
    MANIFEST_NAME,
    PLAN_NAME,
    FileEntry,
    Manifest,
    digest_json,
    hash_file,
    write_manifest,
)
from varcli.artifacts.verify import read_json_lines, read_manifest, read_plan, unfinished_kind
from varcli.artifacts.write import prepare_folder, write_json, write_text
from varcli.data.codes_shards import PLAIN_PRECISION, PROGRESS_PATTERN, CodesPlan, ShardWriter, shard_positions
from varcli.data.paths import escape_path
from varcli.data.skips import allowed_skips
from varcli.errors import ArtifactError, ConfigError, SkipLimitError

if TYPE_CHECKING:
    from torch import Tensor

    from varcli.data.images import ImageTree
    from varcli.data.stream import DecodedBatch

CODES_KIND = "codes"


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
        self._shards = ShardWriter(out, plan, tree)
        self.notes: dict[str, Any] = {}  # further values of the manifest
        self._stack = contextlib.ExitStack()
        self.finished: Manifest | None = None  # set when the cache is complete

    def __enter__(self) -> Self:
        self._stack.enter_context(hold_folder(self.out, {MANIFEST_NAME, PLAN_NAME}, "codes cache"))
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

    def missing_shards(self, split: str) -> list[int]:
        """Return the numbers of the shards that are not finished, rising."""
        if self.finished is not None:
            return []
        return [number for number in range(self._num_shards(split)) if number not in self._done[split]]

    def missing(self, split: str) -> np.ndarray:
        """Return the positions of all images in shards that are not finished, int64, rising."""
        spans = [shard_positions(self.plan, self.tree, split, number) for number in self.missing_shards(split)]
        return np.concatenate([np.empty(0, np.int64), *spans])

    @property
    def digest(self) -> str:
        """SHA-256 of the settings and the images' names: equal where the cache will be."""
        return digest_json([self._settings, self.plan.precision])

    def add(self, split: str, codes_BL: Tensor, batch: DecodedBatch) -> int:
        """Take the codes of one batch, as `ShardWriter.add` does. Returns the number of shards written."""
        records = self._shards.add(split, codes_BL, batch)
        self._done[split].update((record["shard"], record) for record in records)
        return len(records)

    def collect(self) -> None:
        """Take over the shards that other processes have written by now."""
        for log in sorted(self.out.glob(PROGRESS_PATTERN)):
            for record in read_json_lines(log):
                if record["shard"] not in self._done.get(record["split"], {}):
                    self._take(record)

    def note(self, name: str, value: Any) -> None:
        """Remember a JSON value for the manifest, also for a run that goes on with this cache."""
        self.notes[name] = value
        write_json(self.out / PLAN_NAME, {**self._settings, "notes": self.notes})

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
        info = {**self._settings, **self.notes, "source": str(self.tree.root)}
        info |= {"splits": {}, "skipped": [], "converted": {}}
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
        # left out where it is the usual one, so that caches without the entry mean the same
        precision = {"precision": plan.precision} if plan.precision != PLAIN_PRECISION else {}
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
                name: {**plan.decode[name].describe(), "views": plan.views[name]} for name in sorted(plan.decode)
            },
            "images_digest": digest.hexdigest(),
            "shard_images": plan.shard_images,
            **precision,
        }

    def _resume(self) -> None:
        """Take over what an earlier run left, or begin."""
        if (self.out / MANIFEST_NAME).exists():
            manifest = read_manifest(self.out, CODES_KIND)
            self._require_same(manifest.info)
            self.finished = manifest
            self._forget_progress()
            return
        if (self.out / PLAN_NAME).exists():
            begun = read_plan(self.out, CODES_KIND)
            self._require_same(begun)
            self.notes = dict(begun.get("notes", {}))
        else:
            write_json(self.out / PLAN_NAME, self._settings)
        for name, listing in self._listings.items():
            write_text(self.out / images_name(name), listing)
        self.collect()

    def _take(self, record: dict[str, Any]) -> None:
        """Count a shard as done if the file is still what the log says."""
        path = self.out / record["name"]
        entry = FileEntry(record["size"], record["sha256"])
        if record["split"] in self._done and path.is_file() and hash_file(path) == entry:
            self._done[record["split"]][record["shard"]] = record

    def _require_same(self, found: Mapping[str, Any]) -> None:
        now = {**self._settings, "precision": self.plan.precision}
        before = {key: found.get(key, PLAIN_PRECISION if key == "precision" else None) for key in now}
        changes = configs.differences(before, now, is_strict=True)
        if changes:
            if "images_digest" in changes:  # which tells nobody anything
                changes["images_digest"] = "other images"
            # a seed stands in several places
            texts = dict.fromkeys(re.sub(r"\baugment\.\w+\.", "", text) for text in changes.values())
            raise ConfigError(
                f"codes cache `{self.out}` was begun with other settings: {'; '.join(texts)}",
                "repeat them to go on with it, choose another --out, or delete that folder to start anew",
            )

    def _forget_progress(self) -> None:
        for path in (self.out / PLAN_NAME, *self.out.glob(PROGRESS_PATTERN)):
            path.unlink(missing_ok=True)


def images_name(split: str) -> str:
    """Name of the file that lists a split's images."""
    return f"{split}-images.txt"


def begun_with(out: Path) -> str | None:
    """Return the fingerprint of the tokenizer that the cache in `out`, finished or not, was begun with; None if none was."""
    if (Path(out) / MANIFEST_NAME).exists():
        return str(read_manifest(Path(out), CODES_KIND).info["tokenizer"])
    if unfinished_kind(Path(out)) is not None:
        found = read_plan(Path(out), CODES_KIND).get("tokenizer")
        return None if found is None else str(found)
    return None
