"""What samples are measured against where nothing, or something misspelt, is named."""

from __future__ import annotations

import shutil

import pytest

from varcli.data.emoji import EMOJI64_CLASSES
from varcli.errors import ArtifactError, ConfigError
from varcli.metrics import EvalConfig, evaluate
from varcli.metrics.reference import default_reference


def test_a_misspelt_name_is_answered_with_the_nearest(samples):
    with pytest.raises(ArtifactError, match="no reference") as caught:
        evaluate(samples, EvalConfig(reference="imagnet512", features="lite0", device="cpu"))
    assert "did you mean imagenet512?" in caught.value.hint


def test_the_default_is_what_is_recorded_else_imagenet_at_their_size(tmp_path):
    assert default_reference({"reference": str(tmp_path)}, (64, 64)) == str(tmp_path)
    assert default_reference({"reference": "gone", "classes": list(EMOJI64_CLASSES)}) == "emoji64"
    assert default_reference(None, (256, 256)) == "imagenet256"
    assert default_reference({"classes": ["x"] * 1000}, (512, 512)) == "imagenet512"
    for info, side in ((None, (64, 64)), ({"classes": ["a", "b"]}, (256, 256)), (None, (256, 512))):
        with pytest.raises(ConfigError, match="which real images"):
            default_reference(info, side)


def test_samples_know_the_images_their_model_learned_from(tiny_tokenizer, tiny_images, tmp_path, monkeypatch):
    from varcli.data.codes import CodesCache
    from varcli.tokenizer.encode import tokenize
    from varcli.tokenizer.store import save_tokenizer

    monkeypatch.chdir(tmp_path)
    save_tokenizer(tmp_path / "tokenizer", tiny_tokenizer)
    tokenize(tiny_images, tmp_path / "codes", tmp_path / "tokenizer", workers=0, device="cpu")
    assert CodesCache.open(tmp_path / "codes").info["source"] == str(tiny_images)
    shutil.rmtree(tmp_path / "codes")
