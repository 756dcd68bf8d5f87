"""What a reader must know before comparing numbers: each trap that can be seen from the data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from varcli.metrics.inception import WEIGHTS_SHA256

if TYPE_CHECKING:
    from varcli.metrics.features import Extractor
    from varcli.metrics.sources import ImageSource

PUBLISHED_COUNT = 50_000  # samples behind published FIDs
_CLASS_SHIFT = 0.1  # share of images that would have to change class; emoji64's splits differ by less
_SCORE_CHANGE = 0.05  # relative, between two orders
_GRID_IMAGES = 64  # looked at for traces of JPEG
_GRID_CONTRAST = 1.07  # clean drawings and a model's samples come to 0.96 ... 1.04, JPEG of quality 95 to 1.09 and more


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What an evaluation saw."""

    samples: ImageSource | None
    reference: ImageSource | None
    extractor: Extractor
    metrics: Mapping[str, float]
    num_repeated: int  # samples whose pixels another sample has too
    has_unused_statistics: bool  # the samples' file holds stored statistics, which were not used
    score_in_other_order: float | None  # Inception Score of the samples in file order, or shuffled
    info: Mapping[str, Any]  # of the manifest that `varcli sample` wrote, empty for others
    grid_contrast: float | None  # of the samples, see `grid_contrast`


def find(findings: Findings) -> tuple[str, ...]:
    """Return one sentence a trap, the gravest first."""
    return (*_about_features(findings), *_about_samples(findings), *_about_counts(findings))


def _about_features(findings: Findings) -> Iterator[str]:
    extractor = findings.extractor
    if extractor.name != "inception":
        yield f"features are {extractor.name}'s: these numbers are not FID and compare only with each other"
    elif extractor.weights_sha256 != WEIGHTS_SHA256:
        yield "the Inception weights are not the published ones: these numbers are not those of papers"


def _about_samples(findings: Findings) -> Iterator[str]:
    if findings.num_repeated:
        yield f"{findings.num_repeated} samples are exact copies of one another: was one seed used twice?"
    for name, source in (("samples", findings.samples), ("reference images", findings.reference)):
        if source is not None and source.num_jpeg:
            yield f"{source.num_jpeg} of {source.count} {name} are JPEG, whose artefacts change the numbers"
    if (
        findings.grid_contrast is not None
        and findings.grid_contrast > _GRID_CONTRAST
        and not _num_jpeg(findings.samples)
    ):
        yield (
            f"a grid of 8 pixels shows in the samples ({findings.grid_contrast:.2f} times the contrast beside it): were they "
            "JPEG once? Its artefacts change the numbers; save PNG"
        )
    if findings.info.get("smooth"):
        yield "the samples were drawn with --smooth, which is for looking at: published numbers are without it"
    yield from _about_classes(findings)
    if findings.has_unused_statistics:
        yield "the samples' file holds stored statistics; they were not used, the images were"
    score = findings.metrics.get("inception_score") or findings.metrics.get(f"is_{findings.extractor.name}")
    other = findings.score_in_other_order
    if score and other and abs(score - other) > _SCORE_CHANGE * score:
        yield f"the Inception Score depends on the order of the images: {score:.2f} as reported, {other:.2f} in the other order"


def _about_classes(findings: Findings) -> Iterator[str]:
    shift = _class_shift(findings)
    if shift > _CLASS_SHIFT:
        yield f"classes are mixed differently in samples and reference: {shift:.0%} of the images would have to change class"
    elif findings.samples is not None and findings.samples.labels is not None and findings.reference is None:
        counts = class_counts(findings.samples)
        if counts.min() != counts.max():
            yield (
                f"classes have between {counts.min()} and {counts.max()} samples: published numbers are of equally many of "
                "each class"
            )


def _about_counts(findings: Findings) -> Iterator[str]:
    if findings.samples is None:
        return
    num_features, count = findings.extractor.num_features, findings.samples.count
    has_distance = bool({"fid", "sfid", f"fd_{findings.extractor.name}"} & set(findings.metrics))
    smallest = min(count, findings.reference.count) if findings.reference is not None else count
    if has_distance and smallest <= num_features:
        yield (
            f"{smallest} images are few for {num_features} features: the Frechet distance comes out far too large; "
            "compare it only with the floor, or with equally many images"
        )
    elif has_distance and findings.extractor.name == "inception" and count < PUBLISHED_COUNT:
        yield f"{count} samples: published FIDs use {PUBLISHED_COUNT}, and fewer give a larger one"


def _class_shift(findings: Findings) -> float:
    """Return the share of samples that would have to change class for the reference's mix; 0 if unknown."""
    samples, reference = findings.samples, findings.reference
    if samples is None or reference is None or samples.labels is None or reference.labels is None:
        return 0.0
    if samples.classes is None or samples.classes != reference.classes:
        return 0.0
    shares = [
        np.bincount(source.labels, minlength=len(samples.classes)) / len(source.labels)
        for source in (samples, reference)
    ]
    return float(np.abs(shares[0] - shares[1]).sum() / 2)


def class_counts(source: ImageSource) -> np.ndarray:
    """Return how many images each class has, int (classes,)."""
    labels = np.zeros(0, int) if source.labels is None else source.labels
    return np.bincount(labels, minlength=max(1, len(source.classes or ())))


def grid_contrast(source: ImageSource) -> float | None:
    """Return how much stronger steps between pixels are on the borders of 8 x 8 blocks than beside them.

    A step counts up to one grey level, so that edges, which a drawing may have anywhere, do not outweigh the faint steps
    that JPEG's blocks leave everywhere. Looks at some images spread over `source`; about 1 without JPEG, None for images
    too small to tell, or without any contrast.
    """
    if min(source.height, source.width) < 24:
        return None
    at_border = beside = 0.0
    for index in np.unique(np.linspace(0, source.count - 1, _GRID_IMAGES).astype(int)):
        for images in source.batches(1, int(index), int(index) + 1, workers=0):
            grey = images.float().mean(dim=1)
            for steps in (torch.diff(grey, dim=1).transpose(1, 2), torch.diff(grey, dim=2)):
                columns = steps.abs().clamp(max=1).mean(dim=(0, 1))  # step k lies between pixels k and k + 1
                borders = torch.arange(7, len(columns) - 1, 8)
                at_border += float(columns[borders].sum())
                beside += float((columns[borders - 1] + columns[borders + 1]).sum()) / 2
    return at_border / beside if beside > 0 else None


def _num_jpeg(source: ImageSource | None) -> int:
    return 0 if source is None else source.num_jpeg
