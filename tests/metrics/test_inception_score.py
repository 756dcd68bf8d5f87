"""Laws of the Inception Score."""

from __future__ import annotations

import numpy as np
import pytest

from varcli.errors import ConfigError, ShapeError
from varcli.metrics import inception_score


def test_sure_and_varied_predictions_score_the_number_of_classes():
    assert inception_score(np.eye(10).repeat(3, axis=0) * 1000) == pytest.approx(10)


def test_equal_predictions_score_one():
    assert inception_score(np.random.default_rng(0).normal(size=(1, 7)).repeat(20, axis=0)) == pytest.approx(1)


def test_a_short_last_split_counts_as_much_as_the_others():
    logits = np.eye(10).repeat(2, axis=0) * 1000  # 20 images; splits of 19 and of 1, whose score is 1
    assert inception_score(logits, split_size=19) == pytest.approx((inception_score(logits[:19]) + 1) / 2)


def test_sorting_by_class_lowers_it():
    logits = np.eye(10).repeat(10, axis=0) * 1000
    shuffled = logits[np.random.default_rng(0).permutation(100)]
    assert inception_score(logits, 10) == pytest.approx(1)
    assert inception_score(shuffled, 10) > 5


def test_large_logits_do_not_overflow():
    assert inception_score(np.array([[1e6, -1e6], [-1e6, 1e6]])) == pytest.approx(2)


def test_what_are_no_logits_is_refused():
    with pytest.raises(ShapeError):
        inception_score(np.array([[np.nan, 1.0]]))
    with pytest.raises(ConfigError):
        inception_score(np.eye(3), split_size=0)
