"""A sweep tries every combination once, goes on where it stopped, and finds the best."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from varcli.artifacts.verify import read_manifest
from varcli.errors import ConfigError
from varcli.report import sweep as module
from varcli.report.sweep import SweepConfig, sweep
from varcli.sampling import SampleConfig
from varcli.tokenizer.store import save_tokenizer
from varcli.transformer.store import save_transformer

CONFIG = SweepConfig(cfg=(0.0, 1.5), top_k=(0, 4), per_class=2, sampling=SampleConfig(seed=3), device="cpu")


@pytest.fixture
def model(tiny_tokenizer, tiny_transformer, tmp_path):
    folder = tmp_path / "models" / "tiny"
    save_tokenizer(folder / "tokenizer", tiny_tokenizer)
    info = {"tokenizer": tiny_tokenizer.fingerprint(), "patch_nums": [1, 2, 4], "order": "scale"}
    save_transformer(folder / "transformer", tiny_transformer, {**info, "classes": ["apple", "boat", "cat"]})
    return folder


@pytest.fixture
def measured(monkeypatch) -> list[str]:
    """The combinations measured, by a measure that likes cfg 1.5 and top_k 4."""
    names: list[str] = []

    def evaluate(folder, config, on_step):
        names.append(folder.name)
        info = read_manifest(folder, "samples").info
        fid = 10 - info["cfg"] - (info["top_k"] == 4)
        return SimpleNamespace(metrics={"fid": fid, "inception_score": 5 + info["cfg"]}, warnings=("few",))

    monkeypatch.setattr(module, "evaluate", evaluate)
    return names


def test_every_combination_is_drawn_and_measured_once(model, measured, tmp_path):
    result = sweep(model, tmp_path / "sweep", CONFIG)
    names = ["cfg0-k0-p0.96", "cfg0-k4-p0.96", "cfg1.5-k0-p0.96", "cfg1.5-k4-p0.96"]
    assert list(result.metrics) == names == measured
    assert result.best == "cfg1.5-k4-p0.96"
    for name in names:
        manifest = read_manifest(tmp_path / "sweep" / name, "samples")
        assert manifest.info["seed"] == 3
        assert sum(file.startswith("000") for file in manifest.files) == 6
    assert result.chart.read_text().count("<circle") == 4
    assert sweep(model, tmp_path / "sweep", CONFIG) == result
    assert len(measured) == 4


def test_a_stopped_sweep_goes_on_and_can_be_widened(model, measured, tmp_path):
    def stop(name, number, count):
        if number == 3:
            raise KeyboardInterrupt
        return lambda step: None

    with pytest.raises(KeyboardInterrupt):
        sweep(model, tmp_path / "sweep", CONFIG, on_point=stop)
    assert len(measured) == 2
    result = sweep(model, tmp_path / "sweep", SweepConfig(**{**vars(CONFIG), "cfg": (0.0, 1.5, 3.0)}))
    assert len(measured) == 6 == len(result.metrics)


def test_another_sweep_in_the_same_folder_is_refused(model, measured, tmp_path):
    sweep(model, tmp_path / "sweep", CONFIG)
    with pytest.raises(ConfigError, match="another per_class"):
        sweep(model, tmp_path / "sweep", SweepConfig(**{**vars(CONFIG), "per_class": 1}))
    assert json.loads((tmp_path / "sweep" / "sweep.json").read_text())["per_class"] == 2


def test_settings_that_cannot_be_are_refused_before_anything_is_drawn(model, measured, tmp_path):
    for changes in ({"cfg": ()}, {"per_class": 0}):
        with pytest.raises(ConfigError):
            SweepConfig(**changes)
    with pytest.raises(ConfigError):
        sweep(model, tmp_path / "sweep", SweepConfig(top_p=(1.5,)))
    assert not (tmp_path / "sweep").exists()
