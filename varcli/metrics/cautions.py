"""What a reader must know before comparing numbers: each trap that can be seen from the data, what it does, and the way out."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from varcli.metrics.inception import WEIGHTS_SHA256

if TYPE_CHECKING:
    from varcli.metrics.features import Extractor
    from varcli.metrics.nearest import NearCopies
    from varcli.metrics.pixels import PixelTraces
    from varcli.metrics.reference import Reference
    from varcli.metrics.sources import ImageSource

PUBLISHED_COUNT = 50_000  # samples behind published FIDs
_CLASS_SHIFT = 0.1  # share of images that would have to change class; emoji64's splits differ by less
_SCORE_CHANGE = 0.05  # relative, between two orders
_GRID_CONTRAST = 1.07  # clean drawings and a model's samples come to 0.96 ... 1.04, JPEG of quality 95 to 1.09 and more
_NEAR_COPIES = 0.05  # share of samples beyond that of real images; real splits of emoji64 differ by 0.02
_IN_PLACE = 0.25  # reconstructions of emoji64 by a small tokenizer come to 0.75, samples of a model to 0.01
_TO_REAL = 0.7  # real images of another split and samples come to 1.03 ... 1.31, real ones with slight noise to 0.35
_RECONSTRUCTION = re.compile(r"recon|rfid|decoded", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What an evaluation saw."""

    shown: str  # path of the samples
    samples: ImageSource | None
    reference: Reference | None
    extractor: Extractor
    metrics: Mapping[str, float]
    num_repeated: int = 0  # samples whose pixels another sample has too
    has_unused_statistics: bool = False  # the samples' file holds stored statistics, which were not used
    score_in_other_order: float | None = None  # Inception Score of the samples in file order, or shuffled
    info: Mapping[str, Any]  # of the manifest that `varcli sample` wrote, empty for others
    pixels: PixelTraces | None = None  # of the samples
    near: NearCopies | None = None  # of samples and reference images

    @property
    def has_distance(self) -> bool:
        """Whether a Frechet distance is among the metrics."""
        return bool({"fid", "sfid", f"fd_{self.extractor.name}"} & set(self.metrics))


def find(findings: Findings) -> tuple[str, ...]:
    """Return one warning a trap, the gravest first."""
    return tuple(warning for check in CHECKS for warning in check(findings))


def _other_features(found: Findings) -> Iterator[str]:
    if found.extractor.name != "inception":
        yield (
            f"features are {found.extractor.name}'s: these numbers are not FID and compare only with each other; pass "
            "--inception-weights for FID"
        )


def _other_weights(found: Findings) -> Iterator[str]:
    if found.extractor.name == "inception" and found.extractor.weights_sha256 != WEIGHTS_SHA256:
        yield (
            "the Inception weights are not the published ones: these numbers are not those of papers; use torch-fidelity's "
            "file of 2015-12-05"
        )


def _exact_copies(found: Findings) -> Iterator[str]:
    if found.num_repeated:
        yield (
            f"{found.num_repeated} samples are exact copies of one another: was one seed used twice? Copies count as fewer "
            "samples, which raises FID and lowers recall; draw every image with a seed of its own"
        )


def _near_copies(found: Findings) -> Iterator[str]:
    near = found.near
    if near is not None and near.among_samples > near.among_real + _NEAR_COPIES:
        yield (
            f"{near.among_samples:.0%} of the samples almost equal another one (of real images {near.among_real:.0%}): was "
            "one seed used for several batches, or did the model collapse? This raises FID and lowers recall; draw every "
            "image with a seed of its own"
        )


def _copies_of_the_reference(found: Findings) -> Iterator[str]:
    near = found.near
    if near is not None and (near.in_place > _IN_PLACE or near.to_real < _TO_REAL):
        how = (
            f"{near.in_place:.0%} of the samples lie nearest to the reference image of their own number"
            if near.in_place > _IN_PLACE
            else f"samples lie at {near.to_real:.2f} times the distance from reference images that these have among them"
        )
        yield (
            f"{how}: they look like copies or reconstructions of the reference. Such a FID (rFID) judges a tokenizer and is "
            "far below a generator's; do not set it beside those, and measure a generator against images it did not see"
        )


def _reconstructions_against_statistics(found: Findings) -> Iterator[str]:
    reference = found.reference
    if reference is None or reference.statistics is None or not _RECONSTRUCTION.search(found.shown):
        return
    # the example: FoundationVision/VAR#45, one tokenizer by two users
    yield (
        "by their name these samples are reconstructions, but the reference is statistics of a whole data set: rFID is "
        "measured against the images that were reconstructed, in the same crops (users report 0.92 so and 2.70 against "
        "training statistics for one tokenizer); pass those images with --ref, or `varcli eval --tokenizer T IMAGES`"
    )


def _jpeg_files(found: Findings) -> Iterator[str]:
    reference = None if found.reference is None else found.reference.images
    for name, source, advice in (
        ("samples", found.samples, "save them as PNG, from the model and not from these files"),
        (
            "reference images",
            reference,
            "say so beside the number, and compare only with numbers against the same files",
        ),
    ):
        if source is not None and source.num_jpeg:
            yield (
                f"{source.num_jpeg} of {source.count} {name} are JPEG, whose artefacts change every number, FID most: {advice}"
            )


def _jpeg_traces(found: Findings) -> Iterator[str]:
    contrast = None if found.pixels is None else found.pixels.grid_contrast
    if contrast is not None and contrast > _GRID_CONTRAST and not (found.samples and found.samples.num_jpeg):
        yield (
            f"a grid of 8 pixels shows in the samples ({contrast:.2f} times the contrast beside it): were they JPEG once? Its "
            "artefacts change every number, FID most; save PNG from the model"
        )


def _truncated(found: Findings) -> Iterator[str]:
    if found.pixels is not None and found.pixels.is_truncated:
        yield (
            "the samples never reach 255, though 254 is common: were they cut off to whole numbers instead of rounded? That "
            "darkens them by half a grey level and shifts FID; use round(255 x)"
        )


def _smooth(found: Findings) -> Iterator[str]:
    if found.info.get("smooth"):
        yield (
            "the samples were drawn smooth (--smooth, or the model suggests it), which is for looking at: it narrows what is "
            "drawn, and published numbers are without it; draw again with --no-smooth"
        )


def _rejected(found: Findings) -> Iterator[str]:
    kept = found.info.get("reject")
    if kept:
        yield (
            f"a classifier chose which candidates to keep ({kept}), so these results are marked -re: by most measures they are "
            "better than the model is; compare them only with others marked so"
        )


def _label_numbers(found: Findings) -> Iterator[str]:
    source = found.samples
    if source is None or source.labels is None or not len(source.labels):
        return
    lowest, highest = int(source.labels.min()), int(source.labels.max())
    num_classes = len(source.classes) if source.classes else highest + 1
    missing = num_classes - len(np.unique(source.labels[(source.labels >= 0) & (source.labels < num_classes)]))
    if lowest < 0 or highest >= num_classes or missing:
        asked = f"0 to {num_classes - 1}"
        yield (
            f"labels run from {lowest} to {highest} and leave out {missing} of the classes {asked}: the numbers are then of "
            "other classes than the reference's, and FID comes out larger; draw every class, numbered from 0"
        )


def _class_mix(found: Findings) -> Iterator[str]:
    shift = _class_shift(found)
    if shift is not None:
        if shift > _CLASS_SHIFT:
            yield (
                f"classes are mixed differently in samples and reference: {shift:.0%} of the images would have to change "
                "class, which raises FID and lowers recall; draw classes as often as the reference has them"
            )
        return
    if found.samples is None or found.samples.labels is None:
        return
    counts = class_counts(found.samples)
    counts = counts[counts > 0]
    if len(counts) and counts.min() != counts.max():
        yield (
            f"classes have between {counts.min()} and {counts.max()} samples: published numbers are of equally many of each "
            "class, and another mix raises FID; draw equally many"
        )


def _stored_statistics(found: Findings) -> Iterator[str]:
    if found.has_unused_statistics:
        yield (
            "the samples' file holds stored statistics; they were not used, the images were. Evaluators that read them "
            "instead give another FID if they are of other images; remove them from the file"
        )


def _size(found: Findings) -> Iterator[str]:
    reference, samples = found.reference, found.samples
    if reference is None or samples is None or reference.statistics is None:
        return
    if reference.side is None:
        yield (
            f"the reference does not say the size of its images: if it is not {samples.width} x {samples.height}, FID is off "
            "by how differently the two are enlarged for the network; use one of that size"
        )
    elif reference.side != (samples.height, samples.width):
        yield (
            f"the reference is of images of {reference.side[1]} x {reference.side[0]} pixels, but the samples have "
            f"{samples.width} x {samples.height}: FID is off by how differently they are enlarged for the network; use one "
            "of the samples' size"
        )


def _order(found: Findings) -> Iterator[str]:
    score = found.metrics.get("inception_score") or found.metrics.get(f"is_{found.extractor.name}")
    other = found.score_in_other_order
    if score and other and abs(score - other) > _SCORE_CHANGE * score:
        yield (
            f"the Inception Score depends on the order of the images: {score:.2f} as reported, {other:.2f} in the other "
            "order. Read by class, a piece of 5,000 images holds few classes and scores far too low; shuffle a file before "
            "it is packed, and compare the larger number"
        )


def _count(found: Findings) -> Iterator[str]:
    if found.samples is None or not found.has_distance:
        return
    num_features, count = found.extractor.num_features, found.samples.count
    reference = None if found.reference is None else found.reference.images
    is_stored = found.reference is not None and found.reference.statistics is not None
    smallest = count if reference is None or is_stored else min(count, reference.count)
    if smallest <= num_features:
        yield (
            f"{smallest} images are few for {num_features} features: the Frechet distance comes out far too large; "
            "compare it only with the floor, or with equally many images"
        )
    elif found.extractor.name == "inception" and count != PUBLISHED_COUNT:
        how = "fewer give a larger one" if count < PUBLISHED_COUNT else "more give a smaller one"
        yield f"{count:,} samples: published FIDs use {PUBLISHED_COUNT:,}, and {how}; draw as many to compare"


CHECKS: tuple[Callable[[Findings], Iterator[str]], ...] = (
    _other_features,
    _other_weights,
    _exact_copies,
    _near_copies,
    _copies_of_the_reference,
    _reconstructions_against_statistics,
    _size,
    _jpeg_files,
    _jpeg_traces,
    _truncated,
    _smooth,
    _rejected,
    _label_numbers,
    _class_mix,
    _stored_statistics,
    _order,
    _count,
)
"""Every trap, the gravest first; each yields a warning that says what it saw, what that does to the number, what to do."""


def class_counts(source: ImageSource) -> np.ndarray:
    """Return how many images each class has, int (classes,); labels below 0 are left out."""
    labels = np.zeros(0, np.int64) if source.labels is None else source.labels
    return np.bincount(labels[labels >= 0], minlength=max(1, len(source.classes or ())))


def _class_shift(found: Findings) -> float | None:
    """Return the share of samples that would have to change class for the reference's mix; None if unknown."""
    samples = found.samples
    reference = None if found.reference is None else found.reference.images
    if samples is None or reference is None or samples.labels is None or reference.labels is None:
        return None
    if samples.classes is None or samples.classes != reference.classes:
        return None
    size = 1 + max(int(samples.labels.max()), int(reference.labels.max()), len(samples.classes) - 1)
    shares = [np.bincount(source.labels, minlength=size) / len(source.labels) for source in (samples, reference)]
    return float(np.abs(shares[0] - shares[1]).sum() / 2)
