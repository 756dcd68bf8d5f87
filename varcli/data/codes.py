"""The codes cache: a dataset's images as token codes, tied to the tokenizer that wrote them.

On disk: `train-00000.safetensors`, ... with `codes` uint16 (n, L), `labels` int32 (n,) and `sources` int32 (n,), which
index into the lines of `train-images.txt`; rows of one image's views stand together. The manifest comes last.
The writers are in `varcli.data.codes_writer` and `varcli.data.codes_shards`.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from varcli.artifacts.manifest import Manifest
from varcli.artifacts.tensors import parse_tensors
from varcli.artifacts.verify import is_artifact, read_checked_bytes, read_manifest
from varcli.data.codes_shards import CodesPlan
from varcli.data.codes_writer import CODES_KIND, CodesWriter, begun_with, images_name
from varcli.data.images import open_images
from varcli.data.paths import unescape_path
from varcli.data.runs import is_run
from varcli.errors import ArtifactError, DataError, IntegrityError, unknown_name

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["CodesCache", "CodesPlan", "CodesSplit", "CodesWriter", "require_tokenizer"]


class CodesSplit(NamedTuple):
    """All rows of one split, in the order of the image listing."""

    codes: Tensor  # uint16 (N, L); convert a batch, not the whole: torch computes little in uint16
    labels: Tensor  # int64 (N,)
    sources: Tensor  # int32 (N,), line of the image in the listing


class CodesCache:
    """A finished codes cache, open for reading. `info` is the manifest's, `folder` where it lies."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = Path(folder)
        self.manifest = manifest
        self.info: dict[str, Any] = manifest.info
        try:
            self.classes = tuple(str(name) for name in self.info["classes"])
            self.patch_nums = tuple(int(side) for side in self.info["patch_nums"])
            self.vocab_size = int(self.info["vocab_size"])
            self.tokenizer = str(self.info["tokenizer"])
            self.splits: dict[str, dict[str, Any]] = dict(self.info["splits"])
            self._shards = {name: [str(shard) for shard in split["shards"]] for name, split in self.splits.items()}
            self._rows = {name: int(split["rows"]) for name, split in self.splits.items()}
        except (KeyError, TypeError, ValueError) as error:
            raise IntegrityError(
                f"the manifest of codes cache `{folder}` lacks or garbles {error}", "run `varcli tokenize` again"
            ) from None

    @classmethod
    def open(cls, folder: Path, verify: bool = True) -> CodesCache:
        """Open a cache that `varcli tokenize` finished.

        verify: check now that every shard is there with its size; their bytes are always checked when they are loaded.
        Raises ArtifactError if there is no finished cache, IntegrityError if a shard is missing or truncated.
        """
        folder = Path(folder)
        if not is_artifact(folder) and begun_with(folder) is None:
            _require_no_images(folder)
            if is_run(folder):
                raise ArtifactError(
                    f"`{folder}` is a run, but a codes cache is needed", "pass the folder that `varcli tokenize` wrote"
                )
        cache = cls(folder, read_manifest(folder, CODES_KIND))
        if verify:
            for name, entry in cache.manifest.files.items():
                path = folder / name
                if not path.is_file() or path.stat().st_size != entry.size:
                    what = f"has {path.stat().st_size} bytes, not {entry.size}" if path.is_file() else "is missing"
                    raise IntegrityError(f"`{path}` {what}", "run `varcli tokenize` again into another folder")
        return cache

    @property
    def seq_len(self) -> int:
        """L, the codes of one image."""
        return sum(side * side for side in self.patch_nums)

    def num_rows(self, split: str) -> int:
        """Rows of a split: images times views, less what was skipped."""
        self._require(split)
        return self._rows[split]

    def image_paths(self, split: str) -> list[str]:
        """Return the image listing that `sources` index, as paths below the image folder."""
        self._require(split)
        text = str(read_checked_bytes(self.folder, images_name(split), self.manifest), "utf-8")
        return [unescape_path(line) for line in text.splitlines()]

    def load(self, split: str) -> CodesSplit:
        """Read all rows of a split into memory, each shard checked against its SHA-256.

        Raises IntegrityError naming the shard if its bytes, its shape or its values are not what the manifest says.
        """
        import torch

        self._require(split)
        num_rows = self._rows[split]
        codes = np.empty((num_rows, self.seq_len), np.uint16)
        labels, sources = np.empty(num_rows, np.int64), np.empty(num_rows, np.int32)
        start = stop = 0
        for name in self._shards[split]:
            shard = self._read_shard(name)
            stop = start + len(shard["codes"])
            if stop > num_rows:
                break
            codes[start:stop], labels[start:stop] = shard["codes"], shard["labels"]
            sources[start:stop] = shard["sources"]
            start = stop
        if start != num_rows or stop > num_rows:
            raise IntegrityError(f"the shards of `{split}` in `{self.folder}` do not hold the {num_rows} rows declared")
        return CodesSplit(torch.from_numpy(codes), torch.from_numpy(labels), torch.from_numpy(sources))

    def _read_shard(self, name: str) -> dict[str, np.ndarray]:
        path = self.folder / name
        tensors = parse_tensors(read_checked_bytes(self.folder, name, self.manifest), path)
        arrays = {key: tensor.numpy() for key, tensor in tensors.items()}
        expected = {"codes": (np.uint16, self.seq_len, self.vocab_size), "labels": (np.int32, None, len(self.classes))}
        expected["sources"] = (np.int32, None, np.iinfo(np.int32).max)
        for key, (dtype, width, limit) in expected.items():
            array = arrays.get(key)
            shape = None if array is None else (len(array), width) if width else (len(array),)
            if array is None or array.dtype != dtype or array.shape != shape or len(array) != len(arrays["codes"]):
                raise IntegrityError(f"`{path}` has no fitting tensor `{key}`", "run `varcli tokenize` again")
            if array.size and (int(array.max()) >= limit or int(array.min()) < 0):
                raise IntegrityError(f"`{path}` holds {key} outside [0, {limit})", "run `varcli tokenize` again")
        return arrays

    def _require(self, split: str) -> None:
        if split not in self.splits:
            raise unknown_name("split", split, self.splits, DataError)


def require_tokenizer(cache: CodesCache, fingerprint: str, source: str = "`--tokenizer`") -> None:
    """Raise ArtifactError if `cache` was written by another tokenizer than the one with this fingerprint.

    source: how the user named that tokenizer, for the message.
    """
    if cache.tokenizer != fingerprint:
        raise ArtifactError(
            f"codes cache `{cache.folder}` was written by tokenizer {cache.tokenizer[:6]}, "
            f"but {source} is {fingerprint[:6]}",
            "run `varcli tokenize` again with this tokenizer, or pass the one that wrote the cache",
        )


def _require_no_images(folder: Path) -> None:
    """Raise ArtifactError, with the command that makes codes of them, if a folder holds images."""
    try:
        open_images(folder, allow_single_class=True)
    except DataError:
        return
    command = shlex.join(["varcli", "tokenize", str(folder)])
    raise ArtifactError(f"`{folder}` is a folder of images, but a codes cache is needed", f"make one with `{command}`")
