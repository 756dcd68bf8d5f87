"""From images to features: the networks there are, which one is used, and one pass over a set of images."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from varcli.errors import ArtifactError, ConfigError, NumericError, unknown_name
from varcli.metrics.inception import WEIGHTS_NAMES, InceptionExtractor, find_inception_weights
from varcli.metrics.lite0 import Lite0Extractor
from varcli.metrics.sources import ImageSource
from varcli.progress import OnStep, Step, ignore

EXTRACTORS = {"inception": InceptionExtractor, "lite0": Lite0Extractor}
"""Every feature network by name, each in its own file."""

_LOGIT_ROWS = 4096


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

    features: np.ndarray  # float32 (N, D)
    spatial: np.ndarray | None  # float32 (N, S)
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
) -> ExtractedSet:
    """Read all images of `source` once and return their features, in float32 without TF32.

    Raises DataError for an image that cannot be used, NumericError if a feature is not finite.
    """
    if batch_size is None:
        batch_size = extractor.batch_size if extractor.device.type == "cpu" else 128
    features, spatials, seen = [], [], Counter()
    done = 0
    on_step(Step(done, source.count, "images"))
    with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, benchmark=False, allow_tf32=False):
        for images in source.batches(batch_size):
            pooled, maps = extractor.extract(images, spatial)
            features.append(pooled.float().cpu())
            if maps is not None:
                spatials.append(maps.float().cpu())
            seen.update(hashlib.blake2b(image.contiguous().numpy(), digest_size=16).digest() for image in images)
            done += len(images)
            on_step(Step(done, source.count, "images"))
        rows = torch.cat(features)
        if not torch.isfinite(rows).all():
            raise NumericError(f"the {extractor.name} features of `{source.shown}` are not finite", "use --device cpu")
        logits = torch.cat([extractor.logits(part.to(extractor.device)).cpu() for part in rows.split(_LOGIT_ROWS)])
    return ExtractedSet(
        features=rows.numpy(),
        spatial=torch.cat(spatials).numpy() if spatials else None,
        logits=logits.numpy(),
        num_repeated=sum(count for count in seen.values() if count > 1),
    )
