"""Traps that cost others a wrong number are seen, and clean samples are left in peace."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small_sets import draw

from varcli.metrics import cautions
from varcli.metrics.cautions import CHECKS, Findings, find
from varcli.metrics.inception import WEIGHTS_SHA256
from varcli.metrics.nearest import NearCopies
from varcli.metrics.pixels import PixelTraces
from varcli.metrics.reference import Reference
from varcli.metrics.sources import ImageSource, from_tensor
from varcli.metrics.statistics import Statistics

INCEPTION = SimpleNamespace(name="inception", weights_sha256=WEIGHTS_SHA256, num_features=2048)
STATISTICS = Statistics(mean=np.zeros(2), covariance=np.eye(2), count=None)


def images(count: int = 50_000, labels=None, classes=None, **changes) -> ImageSource:
    """Samples that are never read."""
    labels = None if labels is None else np.asarray(labels)
    source = {"shown": "samples", "count": count, "height": 256, "width": 256, "read": None, **changes}
    return ImageSource(**source, labels=labels, classes=classes)


def clean(**changes) -> Findings:
    """Findings as of a published evaluation, with changes."""
    reference = Reference(images=images(10_000), statistics=STATISTICS)
    near = NearCopies(among_samples=0.03, among_real=0.02, to_real=1.0, in_place=0.0)
    traces = PixelTraces(grid_contrast=1.0, is_truncated=False)
    values = {
        "shown": "samples",
        "samples": images(labels=np.arange(50_000) % 1000),
        "reference": reference,
        "extractor": INCEPTION,
        "metrics": {"fid": 2.0, "inception_score": 300.0},
        "score_in_other_order": 299.0,
        "info": {},
        "pixels": traces,
        "near": near,
    }
    return Findings(**{**values, **changes})


def near(**changes) -> NearCopies:
    return NearCopies(**{"among_samples": 0.0, "among_real": 0.0, "to_real": 1.0, "in_place": 0.0, **changes})


def test_a_clean_evaluation_is_left_in_peace():
    assert find(clean()) == ()
    assert find(clean(samples=None, near=None, pixels=None, score_in_other_order=None)) == ()
    assert find(clean(reference=None)) == ()


TRAPS = {
    "other features": ({"extractor": SimpleNamespace(name="lite0", weights_sha256="", num_features=1280)}, "not FID"),
    "other weights": ({"extractor": SimpleNamespace(**{**vars(INCEPTION), "weights_sha256": "0"})}, "those of papers"),
    "one seed": ({"num_repeated": 100}, "100 samples are exact copies"),
    "nearly one seed": ({"near": near(among_samples=0.5)}, "50% of the samples almost equal"),
    "reconstructions": (
        {"near": near(in_place=0.75)},
        "75% of the samples lie nearest to the reference image of their",
    ),
    "the reference itself": ({"near": near(to_real=0.3)}, "0.30 times the distance"),
    "rFID against statistics": ({"shown": "out/vae_recon.npz"}, "in the same crops"),
    "unknown size": ({"reference": Reference(statistics=STATISTICS)}, "does not say the size"),
    "another size": (
        {"reference": Reference(statistics=STATISTICS, record={"images": {"height": 128, "width": 128}})},
        "of images of 128 x 128 pixels, but the samples have 256 x 256",
    ),
    "JPEG files": ({"samples": images(num_jpeg=3)}, "3 of 50000 samples are JPEG"),
    "JPEG reference": (
        {"reference": Reference(images=images(10_000, num_jpeg=10_000), statistics=STATISTICS)},
        "10000 of 10000 reference images are JPEG",
    ),
    "JPEG once": ({"pixels": PixelTraces(grid_contrast=1.2, is_truncated=False)}, "a grid of 8 pixels"),
    "truncated": ({"pixels": PixelTraces(grid_contrast=1.0, is_truncated=True)}, "half a grey level"),
    "smooth": ({"info": {"smooth": True}}, "--smooth"),
    "rejection": ({"info": {"reject": "1/4"}}, "(1/4), so these results are marked -re"),
    "labels from 1": (
        {"samples": images(labels=1 + np.arange(50_000) % 1000)},
        "run from 1 to 1000 and leave out 1 of",
    ),
    "labels below 0": ({"samples": images(labels=np.arange(50_000) % 1000 - 1)}, "run from -1 to 998"),
    "a missing class": (
        {"samples": images(labels=np.arange(50_000) % 2, classes=("a", "b", "c"))},
        "run from 0 to 1 and leave out 1 of the classes 0 to 2",
    ),
    "unequal classes": ({"samples": images(labels=[0] * 49_999 + [1])}, "between 1 and 49999 samples"),
    "another mix": (
        {
            "samples": images(labels=[0, 1], classes=("a", "b")),
            "reference": Reference(
                images=images(10_000, labels=[0, 0, 0, 1], classes=("a", "b")), statistics=STATISTICS
            ),
        },
        "25% of the images would have to change class",
    ),
    "stored statistics": ({"has_unused_statistics": True}, "they were not used"),
    "sorted classes": ({"score_in_other_order": 62.07}, "300.00 as reported, 62.07 in the other order"),
    "few": ({"samples": images(1000)}, "few for 2048 features"),
    "fewer than published": (
        {"samples": images(10_000)},
        "10,000 samples: published FIDs use 50,000, and fewer give a lar",
    ),
    "more than published": ({"samples": images(60_000)}, "more give a smaller one"),
}


@pytest.mark.parametrize("name", TRAPS)
def test_each_trap_is_one_warning_with_a_way_out(name):
    changes, words = TRAPS[name]
    (warning,) = find(clean(**changes))
    assert words in warning
    assert "; " in warning or ": save" in warning or ": say" in warning, "what to do is missing"


def test_every_check_is_tried_by_a_trap():
    for check in CHECKS:
        assert any(list(check(clean(**changes))) for changes, _ in TRAPS.values()), check.__name__


def test_one_finding_is_told_once():
    found = find(clean(samples=images(num_jpeg=5), pixels=PixelTraces(grid_contrast=1.5, is_truncated=False)))
    assert len(found) == 1


def test_mixes_of_one_set_of_classes_are_compared_with_each_other():
    classes = ("a", "b")
    reference = Reference(images=images(10_000, labels=[0, 0, 1], classes=classes), statistics=STATISTICS)
    assert find(clean(samples=images(labels=[0, 0, 0, 1, 1], classes=classes), reference=reference)) == ()


def test_labels_that_are_no_classes_do_not_stop_the_count():
    source = from_tensor(torch.from_numpy(draw(3, seed=0)).permute(0, 3, 1, 2), np.array([-1, 0, 2]))
    assert cautions.class_counts(source).tolist() == [1, 0, 1]
