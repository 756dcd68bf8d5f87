"""An evaluation can be measured on a CPU, and its pictures are what a benchmark needs."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from varcli.bench import evaluation
from varcli.bench.calibrate import Ceiling
from varcli.bench.evaluation import EvalBenchConfig, bench_evaluation
from varcli.bench.pictures import draw_picture, write_pictures
from varcli.errors import ConfigError, VarcliError


def test_pictures_repeat_differ_and_survive_the_disk(tmp_path):
    write_pictures(tmp_path / "pictures", 3, 64, workers=1)
    stored = [np.asarray(Image.open(path)) for path in sorted((tmp_path / "pictures").iterdir())]
    assert all(np.array_equal(image, draw_picture(number, 64)) for number, image in enumerate(stored))
    assert not np.array_equal(stored[0], stored[1])


@pytest.fixture
def without_network(monkeypatch):
    """The measurement without what takes a minute: the device's ceiling and the network's passes."""
    ceiling = Ceiling(device="test", dtype="float32", matmul_tflops=0.1, copy_gb_per_second=10.0)
    monkeypatch.setattr(evaluation, "measure_ceiling", lambda *_: ceiling)
    monkeypatch.setattr(evaluation, "_network_part", lambda *_: (evaluation.Part(name="n", seconds=1, images=256), 0.1))


def test_commands_and_parts_are_measured(without_network, monkeypatch):
    commands = []

    def run(name, arguments, images):
        commands.append(arguments)
        return evaluation.Part(name=name, seconds=2.0, images=images)

    monkeypatch.setattr(evaluation, "_run", run)
    result = bench_evaluation(EvalBenchConfig(count=256, reference_count=256, side=32, workers=1, device="cpu"))
    assert commands[0] == commands[1] and commands[0][0] == "eval"
    names = [part.name for part in result.parts]
    assert names[:2] == ["the command, nothing kept", "the command, features kept"]
    assert {"decoding alone", "fid", "sfid", "precision, recall"} <= set(names)
    assert all(part.seconds > 0 for part in result.parts)
    assert 0.5 < result.file_kb < 10
    record = result.record()
    assert (record["stage"], record["device"], record["matmul_tflops"]) == ("eval", "test", 0.1)
    assert len(record["parts"]) == len(result.parts) and "torch" in record


def test_a_command_is_timed_and_its_failure_told():
    part = evaluation._run("help", ["--help"], 1)
    assert 0 < part.seconds < 60
    with pytest.raises(VarcliError, match="there are no samples"):
        evaluation._run("wrong", ["eval", "/nowhere/at/all"], 1)


def test_too_few_images_are_refused():
    with pytest.raises(ConfigError, match="256"):
        EvalBenchConfig(count=10)
