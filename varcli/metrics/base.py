"""What a metric is: which parts of a set of images it reads, what it returns, and why it may have to be left out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from varcli.metrics.arrays import Rows
from varcli.metrics.statistics import Statistics

FEATURES, SPATIAL, LOGITS = "features", "spatial features", "class logits"
STATISTICS, SPATIAL_STATISTICS = "statistics", "spatial statistics"


@dataclass(frozen=True, kw_only=True)
class FeatureSet:
    """What is known of one set of images, samples or reference; parts that are missing are None."""

    features: Rows | None = None  # float (N, D), pooled features, one row an image
    spatial: Rows | None = None  # float (N, 2023), Inception's spatial features, for sFID
    logits: Rows | None = None  # float (N, classes)
    # permutation of the N rows, in which the Inception Score reads; None as they are
    logits_order: np.ndarray | None = None
    statistics: Statistics | None = None  # of the features of a whole data set, of which `features` may be a part
    spatial_statistics: Statistics | None = None  # likewise of the spatial features

    def count(self, part: str) -> int | None:
        """Return how many images `part` (one of the constants above) stands for; 0 if missing, None if unknown."""
        if part in (STATISTICS, SPATIAL_STATISTICS):
            stored = self.statistics if part == STATISTICS else self.spatial_statistics
            if stored is not None:
                return stored.count
            part = FEATURES if part == STATISTICS else SPATIAL
        rows = {FEATURES: self.features, SPATIAL: self.spatial, LOGITS: self.logits}[part]
        return 0 if rows is None else len(rows)


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One entry of the METRICS table. `compute` may return several numbers that share their work."""

    keys: tuple[str, ...]  # names of the numbers it returns, where the features are Inception's
    other_keys: (
        tuple[str, ...] | None
    )  # the names where they are not, to which the network's name is added; None: never
    samples_need: str  # part of the samples it reads
    reference_needs: str | None  # part of the reference it reads; None if it does without
    min_count: int  # fewest images in either set
    larger_is_better: bool
    compute: Callable[[FeatureSet, FeatureSet, torch.device], tuple[float, ...]]  # samples, reference, device

    def obstacle(self, samples: FeatureSet, reference: FeatureSet | None) -> str | None:
        """Return why the metric cannot be computed from these sets, or None if it can."""
        sides = [("samples", samples, self.samples_need)]
        if self.reference_needs is not None:
            if reference is None:
                return "there is no reference"
            sides.append(("reference", reference, self.reference_needs))
        for name, side, part in sides:
            count = side.count(part)
            if count == 0:
                return f"no {part} of the {name} are known"
            if count is not None and count < self.min_count:
                return f"it takes at least {self.min_count} images, but {count} of the {name} are known"
        return None

    def names(self, network: str | None) -> tuple[str, ...]:
        """Return what the numbers are called: as in papers for Inception or unnamed features, else by the network.

        network: a name of the EXTRACTORS table, or None. Empty if the metric does not exist for that network.
        """
        if network in (None, "inception"):
            return self.keys
        return tuple(f"{key}_{network}" for key in self.other_keys or ())
