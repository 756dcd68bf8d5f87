"""The table of metrics, and their computation from two sets of features."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from varcli.errors import ConfigError, unknown_name
from varcli.metrics.base import FeatureSet, Metric
from varcli.metrics.density_coverage import DENSITY_COVERAGE
from varcli.metrics.fid import FID, SFID
from varcli.metrics.inception_score import INCEPTION_SCORE
from varcli.metrics.kid import KID
from varcli.metrics.precision_recall import PRECISION_RECALL

METRICS: dict[str, Metric] = {
    "fid": FID,
    "sfid": SFID,
    "inception_score": INCEPTION_SCORE,
    "precision": PRECISION_RECALL,
    "recall": PRECISION_RECALL,
    "kid": KID,
    "density": DENSITY_COVERAGE,
    "coverage": DENSITY_COVERAGE,
}
"""Every number by name, and the metric that computes it."""

_DEFAULTS = {"inception": ("fid", "sfid", "inception_score", "precision", "recall")}
_OTHER_DEFAULTS = ("kid", "precision", "recall", "fid", "inception_score")  # first what few images can tell


def choose_names(names: Sequence[str] | None, network: str | None) -> list[str]:
    """Return the names under which numbers appear, e.g. ["fid"] or, for lite0, ["kid_lite0"].

    names: entries of METRICS, or names as they appear; None takes the usual ones. network: as in `Metric.names`.
    Raises ConfigError for an unknown name, or one that the network has not.
    """
    if names is None:
        keys = _DEFAULTS.get(network or "inception", _OTHER_DEFAULTS)
        return [name for key in keys for name in _own_names(key, network)]
    by_name = {name: name for metric in METRICS.values() for name in metric.names(network)}
    chosen = []
    for name in names:
        own = _own_names(name, network) if name in METRICS else ()
        if name in ("fid", "sfid") and name not in by_name:
            raise ConfigError(
                f"`{name}` is a distance between Inception features, but the features are {network}'s",
                f"ask for `fd_{network}`, or pass --inception-weights",
            )
        if name not in by_name and not own:
            raise unknown_name("metric", name, {*METRICS, *by_name})
        chosen.extend(entry for entry in (own or (name,)) if entry not in chosen)
    return chosen


def compute(
    samples: FeatureSet,
    reference: FeatureSet | None,
    names: Iterable[str],
    network: str | None = None,
    device: torch.device | str = "cpu",
) -> tuple[dict[str, float], dict[str, str]]:
    """Compute metrics from features.

    names: as `choose_names` returns them. Returns the numbers by name, and for those that cannot be computed the reason.
    """
    wanted = list(names)
    found: dict[str, float] = {}
    skipped: dict[str, str] = {}
    for metric in dict.fromkeys(METRICS.values()):
        own = metric.names(network)
        if not set(own) & set(wanted):
            continue
        obstacle = metric.obstacle(samples, reference)
        if obstacle is not None:
            skipped.update(dict.fromkeys(own, obstacle))
        else:
            values = metric.compute(samples, reference or FeatureSet(), torch.device(device))
            found.update(zip(own, values))
    return (
        {name: found[name] for name in wanted if name in found},
        {name: skipped[name] for name in wanted if name in skipped},
    )


def larger_is_better(name: str, network: str | None = None) -> bool:
    """Say in which direction a number gets better."""
    metric = next(metric for metric in METRICS.values() if name in metric.names(network))
    return metric.larger_is_better


def _own_names(key: str, network: str | None) -> tuple[str, ...]:
    """Return what the number `key` of METRICS is called for a network; empty if it has none."""
    metric = METRICS[key]
    own = metric.names(network)
    return (own[metric.keys.index(key)],) if own else ()
