"""The self-test passes on the original evaluator's numbers, fails beside them, and refuses what it cannot compare."""

from __future__ import annotations

from dataclasses import replace

import pytest

from varcli.errors import ConfigError, DataError
from varcli.metrics.inception import WEIGHTS_SHA256
from varcli.metrics.result import EvalResult
from varcli.metrics.self_test import compare_with_original

# EVAL_PROTOCOL.md, section 7: a port on the same network, on the same files
PORT = {"fid": 3.94103, "sfid": 6.14049, "inception_score": 215.976, "precision": 0.82548, "recall": 0.5285}
RESULT = EvalResult(
    metrics=PORT,
    skipped={},
    floor={},
    floor_images=None,
    samples={"path": "samples.npz", "count": 50_000, "width": 256, "height": 256},
    reference=None,
    features={"network": "inception", "weights_sha256": WEIGHTS_SHA256},
    warnings=(),
    versions={},
)


def test_a_correct_port_agrees_at_both_sizes():
    assert all(entry.agrees for entry in compare_with_original(RESULT))
    small = {"fid": 2.97328, "sfid": 5.09350, "inception_score": 141.4781, "precision": 0.78042, "recall": 0.5906}
    found = compare_with_original(replace(RESULT, metrics=small, samples={**RESULT.samples, "width": 128}))
    assert all(entry.agrees for entry in found)


def test_the_known_mistakes_do_not_agree():
    wrong_layout = compare_with_original(replace(RESULT, metrics={**PORT, "sfid": 299.15}))
    assert [entry.name for entry in wrong_layout if not entry.agrees] == ["sfid"]
    sorted_by_class = compare_with_original(replace(RESULT, metrics={**PORT, "inception_score": 62.07}))
    assert [entry.name for entry in sorted_by_class if not entry.agrees] == ["inception_score"]


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(ConfigError, match="Inception weights"):
        compare_with_original(replace(RESULT, features={"weights_sha256": "0" * 64}))
    with pytest.raises(DataError, match="50,000 samples"):
        compare_with_original(replace(RESULT, samples={**RESULT.samples, "count": 10_000}))
    metrics = {name: value for name, value in PORT.items() if name != "sfid"}
    with pytest.raises(DataError, match="no spatial statistics"):
        compare_with_original(replace(RESULT, metrics=metrics, skipped={"sfid": "no spatial statistics are known"}))
