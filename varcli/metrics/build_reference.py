"""A reference file of one's own images, like the ones that papers share: statistics of all of them, and some of them."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from varcli import __version__
from varcli.artifacts.manifest import digest_json
from varcli.artifacts.write import prepare_folder
from varcli.data.images import ImageTree, Split, open_images, probe_sizes
from varcli.data.paths import escape_path
from varcli.data.samples import write_npz
from varcli.devices import resolve_device
from varcli.errors import ConfigError, DataError, unknown_name
from varcli.metrics.arrays import check_rows, float64_device, pieces
from varcli.metrics.features import Extractor, choose_extractor, extract_features
from varcli.metrics.npz import RECORD_KEY, SPATIAL_KEYS, STATISTICS_KEYS
from varcli.metrics.sources import ImageSource, from_tree
from varcli.metrics.statistics import RunningStatistics
from varcli.progress import OnStep, Step, ignore

ALL = "all"
"""The split of every image there is."""

# images whose features and logits are held at once, 2.4 GB of Inception's where no cache keeps them on disk; a multiple
# of every batch size, so that a batch, and its rounding, is that of one pass over all images
_PIECE = 2**16
_STATISTICS_ROWS = 4096


@dataclass(frozen=True, kw_only=True)
class ReferenceConfig:
    """How a reference file is made."""

    size: int | None = None  # pixels; larger images are cut in the centre; None takes the size that all of them have
    split: str | None = None  # "train", "val" or "all"; None takes the training images, as papers do
    images: int = 10_000  # stored, for precision and recall; chosen at random, in their order
    features: str = "auto"  # as in `choose_extractor`
    inception_weights: Path | None = None  # likewise
    allow_unknown_weights: bool = False  # likewise
    seed: int = 0  # of the choice
    device: str = "auto"  # as in `varcli.devices.resolve_device`
    batch_size: int | None = None  # images at a time; None chooses
    workers: int | None = None  # processes that decode; None chooses
    cache: Path | None = None  # folder that keeps features, so that a killed build goes on; None keeps none

    def __post_init__(self) -> None:
        if self.images < 1 or (self.size is not None and self.size < 1) or self.seed < 0:
            raise ConfigError("images and size must be at least 1, and seed 0 or more")


@dataclass(frozen=True, kw_only=True)
class ReferenceResult:
    """What was written."""

    file: Path
    num_images: int  # that the statistics are of
    num_stored: int  # of them in the file
    size: int  # pixels
    network: str  # whose features they are


def build_reference(
    images: Path, out: Path, config: ReferenceConfig | None = None, on_step: OnStep = ignore
) -> ReferenceResult:
    """Write statistics of a folder of images, and some of its images, to the npz file `out`.

    The file has the keys of the ADM evaluation suite: `arr_0`, `mu`, `sigma` and, for Inception, `mu_s`, `sigma_s`; beside
    them `varcli`, a JSON text of what made it. Raises DataError for images that cannot be used, ConfigError for settings
    that do not fit them, ArtifactError if the file cannot be written.
    """
    config, out = config or ReferenceConfig(), Path(out)
    if out.suffix != ".npz" or out.is_dir():
        raise ConfigError(f"the reference `{escape_path(str(out))}` must be an npz file", "e.g. --out ref.npz")
    tree, split = _choose_split(open_images(images, allow_single_class=True), config.split)
    size = config.size or _common_size(tree, split)
    total = len(tree.splits[split])
    if total < 2:
        raise DataError(f"`{escape_path(str(images))}` holds {total} image, but a reference needs at least 2")
    device = resolve_device(config.device)
    extractor = choose_extractor(config.features, config.inception_weights, device, config.allow_unknown_weights)
    count = min(config.images, total)
    prepare_folder(out.parent, need_bytes=count * size * size * 3 + 2**27, sweep=False)
    parts = [
        _with_kept_digest(from_tree(tree, split, size, np.arange(start, min(start + _PIECE, total))))
        for start in range(0, total, _PIECE)
    ]
    arrays = _statistics(parts, extractor, config, on_step)
    digests = [part.digest() for part in parts if part.digest]
    # the name alone: the file is for sharing, and where the images lay on one machine is nobody's business
    name = escape_path(tree.root.resolve().name)
    described = {**parts[0].describe(), "path": name, "split": split, "count": total}
    record: dict[str, Any] = {
        "images": described,
        "content": digests[0] if len(digests) == 1 else digest_json(digests),
        "stored": {"count": count, "seed": config.seed},
        "classes": list(tree.classes),
        "network": extractor.name,
        "weights_sha256": extractor.weights_sha256,
        "preprocessing": extractor.preprocessing(size, size),
        "versions": {"varcli": __version__, **{name: version(name) for name in ("torch", "numpy", "pillow")}},
    }
    arrays[RECORD_KEY] = np.array(json.dumps(record))
    chosen = np.sort(np.random.default_rng(config.seed).permutation(total)[:count])
    stored = from_tree(tree, split, size, chosen)
    batches = stored.batches(64, workers=config.workers)
    on_step(Step(0, count, "images", message="storing images"))
    write_npz(out, (image.numpy() for batch in batches for image in batch), count, size, arrays)
    on_step(Step(count, count, "images"))
    return ReferenceResult(file=out, num_images=total, num_stored=count, size=size, network=extractor.name)


def _choose_split(tree: ImageTree, name: str | None) -> tuple[ImageTree, str]:
    """Return the tree, with a split of everything if that is asked for, and the name of the split to use."""
    if name == ALL:
        splits = list(tree.splits.values())
        pixels = [split.pixels for split in splits if split.pixels is not None]
        everything = Split(
            paths=tuple(path for split in splits for path in split.paths),
            labels=np.concatenate([split.labels for split in splits]),
            pixels=np.concatenate(pixels) if pixels else None,
        )
        return replace(tree, splits={ALL: everything}), ALL
    if name is not None and name not in tree.splits:
        raise unknown_name("split", name, [*tree.splits, ALL])
    return tree, name or next(iter(tree.splits))


def _statistics(
    parts: list[ImageSource], extractor: Extractor, config: ReferenceConfig, on_step: OnStep
) -> dict[str, np.ndarray]:
    """Return mean and covariance of the features of all parts together, by their keys in the file."""
    running: dict[tuple[str, str], RunningStatistics] = {}
    total, before = sum(part.count for part in parts), 0
    device = float64_device(extractor.device)
    for part in parts:
        found = extract_features(
            part,
            extractor,
            extractor.name == "inception",
            config.batch_size,
            _shifted(on_step, before, total),
            cache=config.cache,
            workers=config.workers,
        )
        for keys, rows in ((STATISTICS_KEYS, found.features), (SPATIAL_KEYS, found.spatial)):
            if rows is not None:
                check_rows("features", rows)
                for _, piece in pieces(rows, _STATISTICS_ROWS, device):
                    running.setdefault(keys, RunningStatistics()).update(piece)
        before += part.count
    arrays: dict[str, np.ndarray] = {}
    for keys, sums in running.items():
        statistics = sums.finish()
        arrays |= {keys[0]: statistics.mean, keys[1]: statistics.covariance}
    return arrays


def _with_kept_digest(part: ImageSource) -> ImageSource:
    """Hash a part once only: of a million files that takes minutes, and both the cache and the record ask for it."""
    return part if part.digest is None else replace(part, digest=functools.cache(part.digest))


def _shifted(on_step: OnStep, before: int, total: int) -> OnStep:
    """Count the images of one part as some of all."""
    return lambda step: on_step(replace(step, done=before + step.done, total=total))


def _common_size(tree: ImageTree, split: str) -> int:
    """Return the side that a few images looked at all have. Raises ConfigError if they differ or are not square."""
    sizes = set(probe_sizes(tree.root, tree.splits[split]))
    width, height = next(iter(sizes), (0, 0))
    if len(sizes) != 1 or width != height:
        raise ConfigError(
            "the images differ in size or are not square, so the reference's size must be given", "e.g. --size 256"
        )
    return width
