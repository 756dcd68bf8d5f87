"""The core of `varcli eval`: samples and reference in, numbers and everything that moves them out."""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from varcli import __version__
from varcli.devices import resolve_device
from varcli.distributed import ALONE, World
from varcli.errors import ConfigError, DataError, ShapeError
from varcli.metrics import cautions
from varcli.metrics.arrays import Rows
from varcli.metrics.base import FeatureSet
from varcli.metrics.compute import METRICS, choose_names, compute
from varcli.metrics.features import ExtractedSet, choose_extractor, extract_features
from varcli.metrics.inception import WEIGHTS_SHA256
from varcli.metrics.inception_score import inception_score
from varcli.metrics.named_references import is_named
from varcli.metrics.nearest import NearCopies, find_near_copies, find_neighbours
from varcli.metrics.pixels import look_at
from varcli.metrics.published import Published, published_at
from varcli.metrics.reference import Reference, default_reference, open_reference
from varcli.metrics.result import EvalConfig, EvalResult, Neighbours
from varcli.metrics.samples import Samples, open_samples
from varcli.metrics.sources import ImageSource
from varcli.metrics.statistics import Statistics
from varcli.progress import OnStep, Step, ignore

_MARKED = ("reject", "fp8")  # None where they are off
_SETTINGS = (
    "model",
    "tokenizer",
    "seed",
    "cfg",
    "cfg_schedule",
    "top_k",
    "top_p",
    "smooth",
    "precision",
    "guidance",
    "transformer",
    *_MARKED,
)
_SHUFFLE_SEED = 0  # of the order in which the Inception Score reads a folder, and of the halves of a reference


def evaluate(
    samples: Path | Tensor | Iterable[Tensor], config: EvalConfig | None = None, on_step: OnStep = ignore
) -> EvalResult:
    """Measure samples against a reference.

    samples: a folder of images, an npz file (images, or statistics alone), uint8 (N, 3, H, W), or an iterator of such
    batches. Raises VarcliError children for input that cannot be used, and DataError if not one of the metrics can be
    computed.
    """
    with contextlib.ExitStack() as stack:
        run = _Run(samples, config or EvalConfig(), on_step, ALONE, stack)
        return run.measure()


def fill_cache(samples: Path, config: EvalConfig, on_step: OnStep, world: World) -> None:
    """Compute the features that `evaluate` of the same samples and config reads, and leave them in `config.cache`.

    Every rank of `world` must call this; afterwards one of them evaluates. Raises what `evaluate` raises while it reads
    images, and ConfigError if there is no cache.
    """
    with contextlib.ExitStack() as stack:
        _Run(samples, config, on_step, world, stack).extract()


def compute_metrics(
    samples: FeatureSet | Rows | Path | str | Iterator[Tensor],
    reference: FeatureSet | Rows | Path | str | None = None,
    names: Sequence[str] | None = None,
    *,
    features: str = "auto",
    inception_weights: Path | None = None,
    device: str = "cpu",
) -> dict[str, float]:
    """Compute metrics of samples against a reference and return them by name.

    samples, reference: features (N, D) as arrays; FeatureSets, which may hold logits and statistics too; paths as in
    `evaluate`; as samples also uint8 images (N, 3, H, W), or an iterator of batches of them. names: of METRICS; None takes
    the usual ones that can be computed. features, inception_weights: the network that reads images, see
    `choose_extractor`. Raises DataError if a metric of `names` cannot be computed.
    """
    are_pixels = isinstance(samples, Tensor) and samples.dtype == torch.uint8
    if are_pixels or isinstance(samples, (str, Path, Iterator)):
        config = EvalConfig(
            reference=None if reference is None else str(reference),
            metrics=None if names is None else tuple(names),
            features=features,
            inception_weights=inception_weights,
            device=device,
            floor=False,
        )
        result = evaluate(Path(samples) if isinstance(samples, str) else samples, config)
        values, skipped = result.metrics, result.skipped
    else:
        sets = [FeatureSet(features=rows) if isinstance(rows, Rows) else rows for rows in (samples, reference)]
        if not all(entry is None or isinstance(entry, FeatureSet) for entry in sets) or sets[0] is None:
            raise ShapeError("samples and reference must both be features or both be paths")
        values, skipped = compute(*sets, choose_names(names, None), device=device)
    if names is not None and skipped:
        name, reason = next(iter(skipped.items()))
        raise DataError(f"`{name}` cannot be computed: {reason}")
    return values


class _Run:
    """One evaluation with one network: what is opened, then read, then measured."""

    def __init__(
        self,
        samples: Path | Tensor | Iterable[Tensor],
        config: EvalConfig,
        on_step: OnStep,
        world: World,
        stack: contextlib.ExitStack,
    ) -> None:
        self.config, self.on_step, self.world = config, on_step, world
        self.opened = open_samples(samples, stack)
        device = resolve_device(config.device)
        self.extractor = choose_extractor(
            config.features, config.inception_weights, device, config.allow_unknown_weights
        )
        self.names = choose_names(config.metrics, self.extractor.name)
        self.reference: Reference | None = None
        if any(_needs_reference(name, self.extractor.name) for name in self.names):
            name = config.reference or default_reference(self.opened.info, self.opened.side)
            on_step(Step(0, None, "images", message=f"reference: {name}"))
            if is_named(name) and self.extractor.name != "inception":
                raise ConfigError(
                    f"`{name}` holds statistics of Inception features, but those in use are {self.extractor.name}'s",
                    "pass --inception-weights, or a folder of real images with --ref",
                )
            self.reference = open_reference(name, self.opened.side, stack, on_step)
        for part in (self.opened, self.reference):
            if part is not None:
                self._check_statistics(part.shown, part.statistics)
        if self.reference is not None:
            self._check_record(self.reference)
        self.floor_images = self._choose_floor_images()

    def extract(self) -> tuple[ExtractedSet | None, ExtractedSet | None, ExtractedSet | None]:
        """Read the samples, the reference's images and those for the floor; None for what has no images."""
        reference = None if self.reference is None else self.reference.images
        return self._extract(self.opened.images), self._extract(reference), self._extract(self.floor_images)

    def measure(self) -> EvalResult:
        """Extract, compute, and put the result together."""
        opened, reference = self.opened, self.reference
        sampled, real, held_out = self.extract()
        sample_set = FeatureSet(statistics=opened.statistics, spatial_statistics=opened.spatial_statistics)
        order = np.arange(0)
        if sampled is not None and opened.images is not None:
            order = _score_order(opened.images)
            sample_set = _feature_set(sampled, order)
        real_set = None
        if reference is not None:
            stored = (reference.statistics, reference.spatial_statistics)
            real_set = FeatureSet(statistics=stored[0], spatial_statistics=stored[1])
            if real is not None:
                real_set = _feature_set(real, np.arange(len(real.features)), *stored)
        metrics, skipped = self._compute(sample_set, real_set)
        if not metrics:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in skipped.items())
            raise DataError(f"not one metric can be computed: {reasons}")
        floor, floor_images = self._floor(real, real_set, held_out)
        found = cautions.Findings(
            shown=opened.shown,
            samples=opened.images,
            reference=reference,
            extractor=self.extractor,
            metrics=metrics,
            num_repeated=0 if sampled is None else sampled.num_repeated,
            has_unused_statistics=opened.has_unused_statistics,
            score_in_other_order=self._other_score(sampled, order, metrics),
            info=opened.info or {},
            pixels=None if opened.images is None else look_at(opened.images),
            near=self._near_copies(sampled, real),
        )
        described = {"path": opened.shown} if opened.images is None else opened.images.describe()
        if sampled is not None and opened.images is not None:
            described |= _describe_samples(opened)
            described["order"] = "as in the file" if opened.images.has_order else f"shuffled, seed {_SHUFFLE_SEED}"
        return EvalResult(
            metrics=metrics,
            skipped=skipped,
            floor=floor,
            floor_images=floor_images,
            samples=described,
            reference=None if reference is None else _describe(reference),
            features=self._describe_features(opened.images),
            warnings=cautions.find(found),
            published=self._published(metrics),
            neighbours=self._neighbours(sampled, real),
            class_counts=_count_classes(opened.images),
            versions={
                "varcli": __version__,
                "python": platform.python_version(),
                **{name: version(name) for name in ("torch", "numpy", "pillow", "torch-fidelity")},
            },
        )

    def _extract(self, source: ImageSource | None) -> ExtractedSet | None:
        if source is None:
            return None
        config = self.config
        return extract_features(
            source,
            self.extractor,
            "sfid" in self.names,
            config.batch_size,
            self.on_step,
            cache=config.cache,
            workers=config.workers,
            world=self.world,
        )

    def _compute(self, samples: FeatureSet, reference: FeatureSet | None) -> tuple[dict[str, float], dict[str, str]]:
        return compute(samples, reference, self.names, self.extractor.name, self.extractor.device)

    def _choose_floor_images(self) -> ImageSource | None:
        """Return real images to put in the samples' place, where the reference has more of them than it uses."""
        samples, reference = self.opened.images, self.reference
        if not self.config.floor or reference is None or reference.images is None:
            return None
        same_classes = samples is not None and samples.classes == reference.images.classes
        return reference.more_real_images(
            reference.images.count if samples is None else samples.count,
            samples.labels if same_classes and samples else None,
        )

    def _floor(
        self, real: ExtractedSet | None, real_set: FeatureSet | None, held_out: ExtractedSet | None
    ) -> tuple[dict[str, float], str | None]:
        """Measure real images as if they were samples: others of the same data set, or else one half of the reference."""
        if not self.config.floor or real is None or real_set is None:
            return {}, None
        others = self.floor_images
        if others is not None and held_out is not None:
            floor, _ = self._compute(_feature_set(held_out, _score_order(others)), real_set)
            return floor, f"{others.count} of {others.shown}"
        count = len(real.features)
        order = np.random.default_rng(_SHUFFLE_SEED).permutation(count)
        halves = [_take(real, part) for part in np.array_split(order, 2)]
        floor, _ = self._compute(*halves)
        return floor, f"one half of the reference ({count - count // 2} images) against the other"

    def _other_score(self, sampled: ExtractedSet | None, order: np.ndarray, metrics: dict[str, float]) -> float | None:
        """Return the Inception Score in the order that was not used, where it may differ."""
        if sampled is None or not {"inception_score", f"is_{self.extractor.name}"} & set(metrics):
            return None
        in_file_order = np.array_equal(order, np.arange(len(order)))
        other = np.random.default_rng(_SHUFFLE_SEED).permutation(len(order)) if in_file_order else np.arange(len(order))
        return inception_score(sampled.logits, order=other)

    def _check_statistics(self, shown: str, statistics: Statistics | None) -> None:
        if statistics is not None and statistics.num_features != self.extractor.num_features:
            raise DataError(
                f"`{shown}` holds statistics of {statistics.num_features} features, but the network in use "
                f"({self.extractor.name}) has {self.extractor.num_features}",
                "stored statistics of papers need --inception-weights"
                if self.extractor.name != "inception"
                else "make them again with this network",
            )

    def _published(self, metrics: dict[str, float]) -> tuple[Published, ...]:
        """Rows of papers, if the features and the reference are theirs."""
        reference, images = self.reference, self.opened.images
        is_theirs = self.extractor.weights_sha256 == WEIGHTS_SHA256 and reference is not None and reference.is_published
        return published_at(images.width) if is_theirs and images is not None and "fid" in metrics else ()

    def _near_copies(self, sampled: ExtractedSet | None, real: ExtractedSet | None) -> NearCopies | None:
        if sampled is None or real is None:
            return None
        return find_near_copies(sampled.features, real.features, self.extractor.device)

    def _neighbours(self, sampled: ExtractedSet | None, real: ExtractedSet | None) -> tuple[Neighbours, ...]:
        samples, reference = self.opened.images, self.reference
        if not self.config.neighbours or sampled is None or samples is None or real is None:
            return ()
        if reference is None or reference.images is None:
            return ()
        return find_neighbours(
            samples, sampled.features, reference.images, real.features, self.config.neighbours, self.extractor.device
        )

    def _check_record(self, reference: Reference) -> None:
        """Refuse a file that says that its statistics are of other features than those in use."""
        mine = {"network": self.extractor.name, "weights_sha256": self.extractor.weights_sha256}
        for key, value in mine.items():
            if reference.record.get(key, value) != value:
                raise DataError(
                    f"`{reference.shown}` holds statistics of {reference.record.get('network')} features "
                    f"({reference.record[key]}), but those in use are {self.extractor.name}'s ({value})",
                    "make it again with `varcli reference build`, or choose --features to fit",
                )

    def _describe_features(self, images: ImageSource | None) -> dict[str, Any]:
        side = (0, 0) if images is None else (images.height, images.width)
        return {
            "network": self.extractor.name,
            "weights_sha256": self.extractor.weights_sha256,
            "preprocessing": self.extractor.preprocessing(*side),
            "device": str(self.extractor.device),
            "precision": "float32 features, float64 metrics",
        }


def _needs_reference(name: str, network: str) -> bool:
    return any(metric.reference_needs for metric in METRICS.values() if name in metric.names(network))


def _score_order(source: ImageSource) -> np.ndarray:
    """Return the order in which the Inception Score reads: a file's own, a folder's shuffled, since it is by class."""
    if source.has_order:
        return np.arange(source.count)
    return np.random.default_rng(_SHUFFLE_SEED).permutation(source.count)


def _feature_set(
    extracted: ExtractedSet,
    order: np.ndarray,
    statistics: Statistics | None = None,
    spatial_statistics: Statistics | None = None,
) -> FeatureSet:
    """Make a set of everything; `order` is the Inception Score's alone."""
    return FeatureSet(
        features=extracted.features,
        spatial=extracted.spatial,
        logits=extracted.logits,
        logits_order=order,
        statistics=statistics,
        spatial_statistics=spatial_statistics,
    )


def _take(extracted: ExtractedSet, rows: np.ndarray) -> FeatureSet:
    """Make a set of some rows."""
    return FeatureSet(
        features=extracted.features[rows],
        spatial=None if extracted.spatial is None else extracted.spatial[rows],
        logits=extracted.logits[rows],
    )


def _count_classes(source: ImageSource | None) -> dict[str, int]:
    """Return how many images each class has, by its name or number; empty where the classes are not known."""
    if source is None or source.labels is None:
        return {}
    counts = cautions.class_counts(source).tolist()
    names = source.classes if source.classes and len(source.classes) == len(counts) else range(len(counts))
    return {str(name): count for name, count in zip(names, counts, strict=True)}


def _describe_samples(opened: Samples) -> dict[str, Any]:
    """What the samples' manifest says of how they were drawn, and how many there are of each class."""
    info, described = opened.info or {}, dict[str, Any]()
    settings = {name: info[name] for name in _SETTINGS if name in info}
    settings = {name: value for name, value in settings.items() if value is not None or name not in _MARKED}
    if settings:
        described["settings"] = settings
    if opened.images is not None and opened.images.labels is not None:
        counts = cautions.class_counts(opened.images)
        described["images_per_class"] = {"fewest": int(counts.min()), "most": int(counts.max()), "classes": len(counts)}
    return described


def _describe(reference: Reference) -> dict[str, Any]:
    described = {"path": reference.shown} if reference.images is None else reference.images.describe()
    if reference.statistics is not None:
        described["statistics"] = "stored"
    if reference.sha256 is not None:
        described["sha256"] = reference.sha256
    return {**described, "path": reference.shown}
