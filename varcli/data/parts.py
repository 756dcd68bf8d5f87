"""Samples as one npz and no files of their own: parts while they come, joined at the end into the bytes `write_npz` gives.

Folder: `grid.png`, `samples.npz`, `manifest.json`; until it is whole also `.part-<class>-<index>-<count>.npz`.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from varcli.artifacts.manifest import MANIFEST_NAME, FileEntry, Manifest, write_manifest
from varcli.artifacts.verify import read_manifest
from varcli.artifacts.write import write_arrays
from varcli.data.png import save_png
from varcli.data.samples import (
    GRID_NAME,
    NPZ_NAME,
    SAMPLES_KIND,
    SamplesWriter,
    choose_for_grid,
    make_grid,
    sample_name,
    sample_pairs,
    write_npz,
)
from varcli.errors import ArtifactError, ConfigError

_PART_BYTES = 2**25  # 170 images of 256 px
_PART_SECONDS = 60.0  # what a kill may cost where drawing is slow
_PREFIX = ".part-"
_OPEN_PARTS = 4  # in memory while they are joined

Pair = tuple[int, int]  # class index, index within the class


class PartsSaver(contextlib.AbstractContextManager["PartsSaver"]):
    """Collects images and writes a part now and then, and at the end, also of a job that fails.

    Several processes may write into one folder, as long as no image comes twice.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self._pairs: list[Pair] = []
        self._images: list[np.ndarray] = []
        self._since = time.monotonic()

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is None:
            self._flush()
        elif not issubclass(kind, ArtifactError):
            with contextlib.suppress(ArtifactError):  # the first error is the one to tell
                self._flush()

    def save(self, pairs: Sequence[Pair], images: Any) -> None:
        """Take images, uint8 (n, 3, H, W) on the host. Raises ArtifactError if a part cannot be written."""
        self._pairs += pairs
        self._images.append(np.asarray(images).transpose(0, 2, 3, 1))
        is_large = sum(part.nbytes for part in self._images) >= _PART_BYTES
        if is_large or time.monotonic() - self._since >= _PART_SECONDS:
            self._flush()

    def _flush(self) -> None:
        if self._pairs:
            class_index, index = self._pairs[0]
            name = f"{_PREFIX}{class_index:04d}-{index:05d}-{len(self._pairs)}.npz"
            images = np.ascontiguousarray(np.concatenate(self._images))
            write_arrays(self.folder / name, {"pairs": np.array(self._pairs, np.int64), "images": images})
        self._pairs, self._images, self._since = [], [], time.monotonic()


class NpzWriter(SamplesWriter):
    """As `SamplesWriter`, of a folder that ends with an npz in place of PNG files.

    Once it is whole, it can be asked for again, and for fewer images, not for more.
    """

    def __enter__(self) -> Self:
        self._parts: dict[Pair, tuple[Path, int]] = {}
        return super().__enter__()

    def missing(self, wanted: Iterable[Pair]) -> list[Pair]:
        """As in `SamplesWriter`. Raises ConfigError if the folder is whole and lacks some."""
        missing = super().missing(wanted)
        if missing and (self.out / MANIFEST_NAME).exists():
            raise ConfigError(
                f"`{self.out}` holds a finished {NPZ_NAME}, without {len(missing)} of the images asked for",
                "choose another --out; PNG files, with --npz beside them, can be added to",
            )
        return missing

    def add(self, pairs: Iterable[Pair]) -> None:
        """Count in what other processes saved by `PartsSaver`."""
        if not (self.out / MANIFEST_NAME).exists():
            self._find({})

    def finish(
        self,
        wanted: Iterable[Pair],
        info: Mapping[str, Any] | None = None,
        columns: int | None = None,
        npz: bool = True,
        extra: Iterable[str] = (),
    ) -> Manifest:
        """Join the parts, write grid and manifest, and remove the parts. Arguments and errors as in `SamplesWriter`."""
        pairs = list(wanted)
        self.require_all(pairs)
        if (self.out / MANIFEST_NAME).exists():
            self._clear()
            return read_manifest(self.out, SAMPLES_KIND)
        names = sorted(self._parts)
        chosen, columns = choose_for_grid(pairs, columns)
        first = np.stack(list(self._read(chosen)))
        save_png(self.out / GRID_NAME, make_grid(first, columns))
        write_npz(self.out / NPZ_NAME, self._read(names), len(names), first.shape[-1])
        indices: dict[str, list[int]] = {}
        for class_index, index in names:
            indices.setdefault(str(class_index), []).append(index)
        values = {**self.settings, **(info or {}), "indices": indices}
        manifest = write_manifest(self.out, SAMPLES_KIND, values, files=[GRID_NAME, NPZ_NAME, *extra])
        self._clear()
        return manifest

    def _find(self, listed: Mapping[str, FileEntry]) -> None:
        if NPZ_NAME in listed:
            if not self._is_whole(NPZ_NAME, listed[NPZ_NAME]):
                raise ArtifactError(
                    f"`{self.out / NPZ_NAME}` differs from its manifest", "delete the folder and run again"
                )
            self._present = {sample_name(*pair) for pair in sample_pairs(read_manifest(self.out, SAMPLES_KIND))}
            return
        for path in self.out.glob(f"{_PREFIX}*"):
            with _reading(path), np.load(path, allow_pickle=False) as stored:
                pairs = stored["pairs"].tolist()
            self._parts |= {(class_index, index): (path, row) for row, (class_index, index) in enumerate(pairs)}
        self._present = {sample_name(*pair) for pair in self._parts}

    def _read(self, pairs: Iterable[Pair]) -> Iterator[np.ndarray]:
        """Yield images, uint8 (3, H, W), from the parts."""
        opened: dict[Path, np.ndarray] = {}
        for pair in pairs:
            path, row = self._parts[pair]
            if path not in opened:
                if len(opened) == _OPEN_PARTS:
                    opened.pop(next(iter(opened)))
                with _reading(path), np.load(path, allow_pickle=False) as stored:
                    opened[path] = stored["images"]
            yield opened[path][row].transpose(2, 0, 1)

    def _clear(self) -> None:
        for path in self.out.glob(f"{_PREFIX}*"):
            path.unlink()
        self.forget_plan()


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn whatever numpy raises on a damaged file into one clear error."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - zipfile, zlib, struct, numpy: each has its own
        raise ArtifactError(f"`{path}` is damaged: {error}", "delete it and run the same command again") from None
