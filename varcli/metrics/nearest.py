"""Which images lie nearest to which, in the features: pictures for a report, and copies that are not exact."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from varcli.metrics.arrays import Rows, float64_device
from varcli.metrics.distances import squared_distances
from varcli.metrics.pixels import read_some, spread
from varcli.metrics.result import Neighbours
from varcli.metrics.sources import ImageSource

_NUM_SHOWN = 5  # real images beside a sample
_NUM_PROBES = 512  # images whose neighbours are looked for; against 50,000 others that takes seconds on a CPU
_MIN_IMAGES = 64  # fewer say nothing of what is usual
# Of the usual distance between real neighbours. In lite0 features of emoji64, 2 to 4 % of real images have another one
# nearer than this, no sample of a trained model has, and 56 % of images that are there twice, the second time with noise
# of one grey level; where one value in fifty differs by one level, all have.
_NEAR = 0.35
_SEED = 0  # of the choice of probes
_SAME = 1e-3  # of that distance; features of equal images in different batches differ by some 1e-6
_BLOCK = 4096  # rows


@dataclass(frozen=True, kw_only=True)
class NearCopies:
    """How near samples are to one another and to the reference, as shares and ratios of what real images are."""

    among_samples: float  # share of samples that almost equal another sample, exact copies left out
    among_real: float  # likewise of real images: data sets hold such pairs too
    to_real: float  # median distance of a sample to its nearest real image, over that of real images to theirs
    in_place: float  # share of samples whose nearest real image has their own number; 0 for sets of two sizes


def nearest_rows(
    rows: Rows, others: Rows, count: int, device: torch.device | str = "cpu"
) -> tuple[np.ndarray, np.ndarray]:
    """Return for each of `rows` (n, D) the numbers of its `count` nearest `others` (m, D) and their distances, (n, count).

    Nearest first; fewer than `count` if there are not as many others.
    """
    device = float64_device(device)
    squared = torch.empty((len(rows), 0), dtype=torch.float64, device=device)
    places = torch.empty((len(rows), 0), dtype=torch.int64, device=device)
    for start in range(0, len(others), _BLOCK):
        piece = others[start : start + _BLOCK]
        block = torch.cat([part.squared for part in squared_distances(rows, piece, device)])
        numbers = torch.arange(start, start + len(piece), device=device).expand(len(rows), -1)
        squared, places = torch.cat([squared, block], dim=1), torch.cat([places, numbers], dim=1)
        squared, chosen = squared.topk(min(count, squared.shape[1]), dim=1, largest=False)
        places = places.gather(1, chosen)
    return places.cpu().numpy(), squared.sqrt().cpu().numpy()


def find_near_copies(samples: Rows, real: Rows, device: torch.device | str = "cpu") -> NearCopies | None:
    """Compare distances within samples (N, D), within real images (M, D), and between them; None for few images.

    A share of both sets is looked at, each image of it beside its whole set.
    """
    if min(len(samples), len(real)) < _MIN_IMAGES:
        return None
    sample_probes, real_probes = (_choose(len(rows)) for rows in (samples, real))
    usual = _to_others(real, real_probes, device)
    limit = float(np.median(usual))
    within = _to_others(samples, sample_probes, device)
    places, across = nearest_rows(samples[sample_probes], real, 1, device)
    return NearCopies(
        among_samples=_share_below(within, _NEAR * limit),
        among_real=_share_below(usual, _NEAR * limit),
        to_real=float(np.median(across)) / limit if limit > 0 else 1.0,
        in_place=float(np.mean(places[:, 0] == sample_probes)) if len(samples) == len(real) else 0.0,
    )


def find_neighbours(
    samples: ImageSource, sampled: Rows, reference: ImageSource, real: Rows, count: int, device: torch.device | str
) -> tuple[Neighbours, ...]:
    """Return `count` samples spread over the set, each with the real images nearest to it.

    sampled, real: features (N, D) and (M, D) of the two sets. Raises what reading images raises.
    """
    chosen = spread(samples.count, count)
    places, distances = nearest_rows(sampled[chosen], real, _NUM_SHOWN, device)
    pictures = read_some(samples, chosen)
    originals = read_some(reference, np.unique(places))
    return tuple(
        Neighbours(
            sample=pictures[index],
            nearest=tuple(originals[place] for place in near),
            distances=tuple(float(distance) for distance in far),
        )
        for index, near, far in zip(chosen.tolist(), places.tolist(), distances, strict=True)
    )


def _choose(count: int) -> np.ndarray:
    return np.sort(np.random.default_rng(_SEED).permutation(count)[:_NUM_PROBES])


def _to_others(rows: Rows, probes: np.ndarray, device: torch.device | str) -> np.ndarray:
    """Return the distance of each probe to its nearest other row, which may be an exact copy at distance 0."""
    places, distances = nearest_rows(rows[probes], rows, 2, device)
    is_self = places == probes[:, None]
    # an exact copy may come before the row itself, or push it out; then the other entry is the neighbour
    return np.where(is_self[:, 0], distances[:, 1], distances[:, 0])


def _share_below(distances: np.ndarray, limit: float) -> float:
    return float(np.mean((distances > limit * _SAME) & (distances < limit)))
