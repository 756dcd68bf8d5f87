"""What a reader must know before comparing numbers: each trap that can be seen from the data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from varcli.metrics.inception import WEIGHTS_SHA256

if TYPE_CHECKING:
    from varcli.metrics.features import Extractor
    from varcli.metrics.sources import ImageSource

PUBLISHED_COUNT = 50_000  # samples behind published FIDs
_CLASS_SHIFT = 0.1  # share of images that would have to change class; emoji64's splits differ by less
_SCORE_CHANGE = 0.05  # relative, between two orders


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
    if findings.has_unused_statistics:
        yield "the samples' file holds stored statistics; they were not used, the images were"
    shift = _class_shift(findings)
    if shift > _CLASS_SHIFT:
        yield f"classes are mixed differently in samples and reference: {shift:.0%} of the images would have to change class"
    score = findings.metrics.get("inception_score") or findings.metrics.get(f"is_{findings.extractor.name}")
    other = findings.score_in_other_order
    if score and other and abs(score - other) > _SCORE_CHANGE * score:
        yield f"the Inception Score depends on the order of the images: {score:.2f} as reported, {other:.2f} in the other order"


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
