"""From images to features: the networks there are, which one is used, and one pass over a set of images."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from varcli.distributed import ALONE, World
from varcli.errors import ArtifactError, ConfigError, NumericError, unknown_name
from varcli.metrics.feature_cache import FeatureCache, align_batch, join_batches
from varcli.metrics.inception import WEIGHTS_NAMES, InceptionExtractor, find_inception_weights
from varcli.metrics.lite0 import Lite0Extractor
from varcli.metrics.sources import ImageSource
from varcli.progress import OnStep, Step, ignore

EXTRACTORS = {"inception": InceptionExtractor, "lite0": Lite0Extractor}
"""Every feature network by name, each in its own file."""

CACHE_FROM = 256
"""Images from which on features are kept; fewer are computed again in seconds."""

_VERSION = 1  # of what a cached row means; changes with the code that computes it
_LOGIT_ROWS = 4096
GPU_BATCH = 256
"""Images at a time on a GPU."""

_HASH_THREADS = 4


class Extractor(Protocol):
    """A fixed network that turns images into rows of features."""

    name: str  # its name in EXTRACTORS, which also marks the names of the metrics
    num_features: int  # D
    batch_size: int  # images at a time on a CPU
    weights_sha256: str
    device: torch.device

    def extract(self, images_B3HW: Tensor, spatial: bool = False) -> tuple[Tensor, Tensor | None]:
        """Return pooled features (B, D) and, if asked for and there are any, spatial ones, of uint8 images."""

    def logits(self, features: Tensor) -> Tensor:
        """Return the class logits that belong to pooled features."""

    def preprocessing(self, height: int, width: int) -> str:
        """Say how images of one size enter the network."""


@dataclass(frozen=True, kw_only=True)
class ExtractedSet:
    """What one pass over a set of images gave, rows in the order of the source."""

    features: np.ndarray  # float32 (N, D), mapped from disk where it is kept there
    spatial: np.ndarray | None  # float32 (N, S), likewise
    logits: np.ndarray  # float32 (N, classes)
    num_repeated: int  # images whose pixels another image of the set has too, each counted


def choose_extractor(
    name: str = "auto",
    inception_weights: Path | None = None,
    device: torch.device | str = "cpu",
    allow_unknown_weights: bool = False,
) -> Extractor:
    """Build a feature network.

    name: "inception", "lite0", or "auto": Inception if its weights are at hand, else lite0. inception_weights: a file;
    None looks where `find_inception_weights` does. Raises ConfigError for an unknown name, ArtifactError if weights are
    missing or wrong.
    """
    device = torch.device(device)
    if name not in ("auto", *EXTRACTORS):
        raise unknown_name("feature network", name, ["auto", *EXTRACTORS])
    if name == "lite0":
        if inception_weights is not None:
            raise ConfigError(
                "Inception weights were given, but lite0 features were asked for", "leave one of them out"
            )
        return Lite0Extractor(device)
    path = find_inception_weights(inception_weights)
    if path is not None:
        return InceptionExtractor(path, device, allow_unknown_weights)
    if name == "inception":
        raise ArtifactError(
            "the Inception weights are not at hand",
            f"fetch {WEIGHTS_NAMES[0]} from torch-fidelity's releases and pass it with --inception-weights",
        )
    return Lite0Extractor(device)


def extract_features(
    source: ImageSource,
    extractor: Extractor,
    spatial: bool = False,
    batch_size: int | None = None,
    on_step: OnStep = ignore,
    *,
    cache: Path | None = None,
    workers: int | None = None,
    world: World = ALONE,
) -> ExtractedSet:
    """Return the features of all images of `source`, in float32 without TF32.

    batch_size: images at a time, rounded down to a power of two. cache: folder that keeps the features of sets of
    `CACHE_FROM` images or more, so that a rerun, after a kill too, computes only what is missing. workers: processes that
    decode. world: ranks that share the work, each of which must call this and gets the whole result.
    Raises DataError for an image that cannot be used, NumericError if a feature is not finite, ConfigError for several
    ranks without a cache, and what writing the cache raises.
    """
    size = align_batch(batch_size or (extractor.batch_size if extractor.device.type == "cpu" else GPU_BATCH))
    settings = {
        "version": _VERSION,
        "network": extractor.name,
        "weights": extractor.weights_sha256,
        "preprocessing": extractor.preprocessing(source.height, source.width),
        "precision": "float32, no TF32",
        "device": extractor.device.type,
        "spatial": spatial,
    }

    def rows(start: int, stop: int) -> Iterator[dict[str, Tensor]]:
        done = start
        on_step(Step(done, stop, "images"))
        waiting = None
        for images in _read_ahead(source.batches(size, start, stop, workers), extractor.device.type == "cuda"):
            begun = _begin_batch(images, extractor, spatial, pool)
            if waiting is not None:
                yield _finish_batch(waiting, extractor, source.shown)
            waiting = begun
            done += len(images)
            on_step(Step(done, stop, "images"))
        if waiting is not None:
            yield _finish_batch(waiting, extractor, source.shown)

    with (
        torch.inference_mode(),
        torch.backends.cudnn.flags(enabled=True, benchmark=False, allow_tf32=False),
        ThreadPoolExecutor(_HASH_THREADS) as pool,
    ):
        if cache is None or source.digest is None or (source.count < CACHE_FROM and world.size == 1):
            if world.size > 1:
                raise ConfigError(f"several processes need a cache, but `{source.shown}` has none", "use one process")
            arrays = {name: part.numpy() for name, part in join_batches(list(rows(0, source.count))).items()}
        else:
            kept = FeatureCache(cache, {**settings, "images": source.digest(), "count": source.count}, source.count)
            arrays = kept.load()
            if arrays is not None:
                on_step(Step(source.count, source.count, "images", message=f"features from {kept.folder}"))
            else:
                arrays = kept.compute(rows, world)
        features = arrays["features"]
        logits = _compute_logits(features, extractor)
    _, counts = np.unique(arrays["pixels"].view("V16"), return_counts=True)
    return ExtractedSet(
        features=features,
        spatial=arrays.get("spatial"),
        logits=logits,
        num_repeated=int(counts[counts > 1].sum()),
    )


@dataclass(frozen=True)
class _Begun:
    """A batch at work."""

    features: Tensor  # (B, D) on the device
    spatial: Tensor | None  # (B, S), likewise
    hashes: list[Future[bytes]]  # of the pixels, 16 bytes an image


def _read_ahead(batches: Iterator[Tensor], pin: bool) -> Iterator[Tensor]:
    """Yield the same batches, each read in a thread while the one before is at work.

    pin: put them into memory that a GPU copies from on its own; from other memory a copy waits for the batch before.
    """

    def read() -> Tensor | None:
        batch = next(batches, None)
        return batch.pin_memory() if pin and batch is not None else batch

    with ThreadPoolExecutor(1) as reader:
        coming = reader.submit(read)
        while (batch := coming.result()) is not None:
            coming = reader.submit(read)
            yield batch


def _compute_logits(features: np.ndarray, extractor: Extractor) -> np.ndarray:
    """Return the logits of features (N, D), which are not kept on disk since they follow from them."""
    logits = np.empty((0, 0), np.float32)
    for start in range(0, len(features), _LOGIT_ROWS):
        rows = torch.from_numpy(features[start : start + _LOGIT_ROWS]).to(extractor.device)
        part = extractor.logits(rows).cpu().numpy()
        if not len(logits):
            logits = np.empty((len(features), part.shape[1]), part.dtype)
        logits[start : start + len(part)] = part
    return logits


def _begin_batch(images: Tensor, extractor: Extractor, spatial: bool, pool: ThreadPoolExecutor) -> _Begun:
    """Give one batch to the network, and its pixels to the threads that hash them."""
    hashes = [pool.submit(_hash_pixels, part) for part in images.chunk(_HASH_THREADS)]
    features, maps = extractor.extract(images, spatial)
    return _Begun(features, maps, hashes)


def _hash_pixels(images: Tensor) -> bytes:
    return b"".join(hashlib.blake2b(image.contiguous().numpy(), digest_size=16).digest() for image in images)


def _finish_batch(begun: _Begun, extractor: Extractor, shown: str) -> dict[str, Tensor]:
    """Return the rows of one batch in memory: features, spatial ones if asked for, and the hashes."""
    digests = b"".join(future.result() for future in begun.hashes)
    rows = {
        "features": begun.features.float().cpu(),
        "pixels": torch.frombuffer(bytearray(digests), dtype=torch.uint8).view(-1, 16),
    }
    if begun.spatial is not None:
        rows["spatial"] = begun.spatial.float().cpu()
    if not torch.isfinite(rows["features"]).all():
        raise NumericError(f"the {extractor.name} features of `{shown}` are not finite", "use --device cpu")
    return rows
