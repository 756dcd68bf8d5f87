"""Evaluation while training measures the weights there are against the images they learn from."""

from __future__ import annotations

import pytest

from varcli.errors import ConfigError
from varcli.report.online import evaluate_request
from varcli.training.transformer_trainer import SampleRequest


def test_samples_are_measured_against_the_images_the_model_learns_from(
    tiny_tokenizer, tiny_transformer, tiny_images, tmp_path, monkeypatch
):
    monkeypatch.delenv("VARCLI_INCEPTION_WEIGHTS", raising=False)
    request = SampleRequest(
        step=1,
        transformer=tiny_transformer.eval(),
        tokenizer=tiny_tokenizer.eval(),
        classes=("apple", "boat", "cat"),
        source=str(tiny_images),
    )
    first, again = (evaluate_request(request, 6, tmp_path / "cache") for _ in range(2))
    assert first == again
    assert first["kid_lite0"] > 0
    with pytest.raises(ConfigError, match="not there"):
        evaluate_request(SampleRequest(**{**vars(request), "source": "gone"}), 6)
