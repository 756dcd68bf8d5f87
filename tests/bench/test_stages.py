"""Every stage can be measured on a CPU, and its numbers belong together."""

from __future__ import annotations

import pytest

from varcli.bench import calibrate
from varcli.bench.stages import STAGES, BenchConfig, encoding_flops, run_bench
from varcli.errors import ConfigError


@pytest.fixture(autouse=True)
def small_ceiling(monkeypatch):
    ceiling = calibrate.Ceiling(device="test", dtype="float32", matmul_tflops=0.1, copy_gb_per_second=10.0)
    monkeypatch.setattr("varcli.bench.stages.measure_ceiling", lambda *_: ceiling)


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_is_measured_with_consistent_numbers(stage):
    config = BenchConfig(depth=1, scales="1,2", tokenizer_width=32, batch_sizes=(1, 2), repeats=1, device="cpu")
    result = run_bench(stage, config)
    assert [entry.batch_size for entry in result.measurements] == [1, 2]
    for entry in result.measurements:
        assert entry.images_per_second == pytest.approx(entry.batch_size / entry.milliseconds * 1e3)
        assert entry.share_of_matmul == pytest.approx(entry.tflops / 0.1)
        assert entry.tflops > 0


def test_work_of_the_released_tokenizer_matches_the_count_on_the_reference():
    assert encoding_flops(BenchConfig()) / 1e9 == pytest.approx(215.1 + 0.23, rel=0.01)


def test_an_unknown_stage_is_refused():
    with pytest.raises(ConfigError, match="stage"):
        run_bench("tokenise")
