"""A reference file of one's own images, like the ones that papers share: statistics of all of them, and some of them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from varcli import __version__
from varcli.artifacts.write import prepare_folder
from varcli.data.images import ImageTree, open_images, probe_sizes
from varcli.data.paths import escape_path
from varcli.data.samples import write_npz
from varcli.devices import resolve_device
from varcli.errors import ConfigError, unknown_name
from varcli.metrics.features import choose_extractor, extract_features
from varcli.metrics.npz import RECORD_KEY, SPATIAL_KEYS, STATISTICS_KEYS
from varcli.metrics.sources import from_tree
from varcli.metrics.statistics import compute_statistics
from varcli.progress import OnStep, Step, ignore


@dataclass(frozen=True, kw_only=True)
class ReferenceConfig:
    """How a reference file is made."""

    size: int | None = None  # pixels; larger images are cut in the centre; None takes the size that all of them have
    split: str | None = None  # None takes the training images, as papers do
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
    if out.suffix != ".npz":
        raise ConfigError(f"the reference `{escape_path(str(out))}` must be an npz file", "e.g. --out ref.npz")
    tree = open_images(images, allow_single_class=True)
    split = config.split or next(iter(tree.splits))
    if split not in tree.splits:
        raise unknown_name("split", split, tree.splits)
    size = config.size or _common_size(tree, split)
    source = from_tree(tree, split, size)
    device = resolve_device(config.device)
    extractor = choose_extractor(config.features, config.inception_weights, device, config.allow_unknown_weights)
    count = min(config.images, source.count)
    prepare_folder(out.parent, need_bytes=count * size * size * 3 + 2**27, sweep=False)
    has_spatial = extractor.name == "inception"
    found = extract_features(
        source,
        extractor,
        has_spatial,
        config.batch_size,
        on_step,
        cache=config.cache,
        workers=config.workers,
    )
    arrays: dict[str, np.ndarray] = {}
    for keys, rows in ((STATISTICS_KEYS, found.features), (SPATIAL_KEYS, found.spatial)):
        if rows is not None:
            statistics = compute_statistics(rows, device)
            arrays |= {keys[0]: statistics.mean, keys[1]: statistics.covariance}
    record: dict[str, Any] = {
        "varcli": __version__,
        "images": source.describe(),
        "content": source.digest() if source.digest else None,
        "stored": {"count": count, "seed": config.seed},
        "classes": list(tree.classes),
        "network": extractor.name,
        "weights_sha256": extractor.weights_sha256,
        "preprocessing": extractor.preprocessing(size, size),
    }
    arrays[RECORD_KEY] = np.array(json.dumps(record))
    chosen = np.sort(np.random.default_rng(config.seed).permutation(source.count)[:count])
    stored = from_tree(tree, split, size, chosen)
    batches = stored.batches(64, workers=config.workers)
    on_step(Step(0, count, "images", message="storing images"))
    write_npz(out, (image.numpy() for batch in batches for image in batch), count, size, arrays)
    on_step(Step(count, count, "images"))
    return ReferenceResult(file=out, num_images=source.count, num_stored=count, size=size, network=extractor.name)


def _common_size(tree: ImageTree, split: str) -> int:
    """Return the side that a few images looked at all have. Raises ConfigError if they differ or are not square."""
    sizes = set(probe_sizes(tree.root, tree.splits[split]))
    width, height = next(iter(sizes), (0, 0))
    if len(sizes) != 1 or width != height:
        raise ConfigError(
            "the images differ in size or are not square, so the reference's size must be given", "e.g. --size 256"
        )
    return width
