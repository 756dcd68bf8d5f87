"""The way from files to codes is measured with the real command, its parts beside it."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from varcli.bench import calibrate
from varcli.bench.files import steady_rate
from varcli.bench.pictures import draw_picture, write_photographs
from varcli.cli.app import app
from varcli.errors import ConfigError

COMMAND = ["bench", "tokenize-files", "--scales", "1,2", "--tokenizer-width", "32", "--n", "9", "--batch-size", "2"]
COMMAND += ["--device", "cpu", "--workers", "0", "--repeats", "1"]


@pytest.fixture(autouse=True)
def small_ceiling(monkeypatch):
    ceiling = calibrate.Ceiling(device="test", dtype="float32", matmul_tflops=0.1, copy_gb_per_second=10.0)
    monkeypatch.setattr("varcli.bench.stages.measure_ceiling", lambda *_: ceiling)


@pytest.fixture(autouse=True)
def own_pictures(monkeypatch):
    """Pictures drawn in this process, since starting others takes longer than drawing them."""

    def write(folder, count, size, workers, on_step):
        for number in range(count):
            (folder / "ab"[number % 2]).mkdir(parents=True, exist_ok=True)
            Image.fromarray(draw_picture(number, *size)).save(folder / "ab"[number % 2] / f"{number}.jpg")

    monkeypatch.setattr("varcli.bench.files.write_photographs", write)


def test_photographs_are_as_large_as_photographs_and_of_two_classes(tmp_path):
    write_photographs(tmp_path, 3, (500, 400), workers=1)
    paths = sorted(tmp_path.rglob("*.jpg"))
    assert [path.parent.name for path in paths] == ["even", "even", "odd"]
    assert all(Image.open(path).size == (500, 400) for path in paths)
    assert 60e3 < np.mean([path.stat().st_size for path in paths]) < 120e3


def test_the_whole_way_and_its_parts_are_measured():
    result = CliRunner().invoke(app, [*COMMAND, "--precision", "bf16", "--json"])
    assert result.exit_code == 0, result.output
    records = [json.loads(line) for line in result.stdout.splitlines()]
    assert [record["stage"].removeprefix("tokenize-files") for record in records] == [
        "",
        ": decoding alone",
        ": encoder alone",
    ]
    whole, decoding, encoder = records
    assert whole["images_per_second"] == pytest.approx(9 / whole["details"]["seconds"])
    assert (whole["details"]["files"], whole["details"]["workers"], whole["precision"]) == (9, 0, "bf16")
    assert 0 < whole["details"]["agreement"]["tokens"] <= 1 and whole["details"]["agreement"]["images"] == 9
    assert whole["details"]["steady_images_per_second"] is None  # five batches
    assert decoding["tflops"] == 0 < encoder["tflops"]
    assert encoder["share_of_matmul"] == pytest.approx(encoder["tflops"] / 0.1)


def test_people_read_a_table_and_what_it_has_no_column_for():
    result = CliRunner().invoke(app, [*COMMAND, "--precision", "fp32"])
    assert result.exit_code == 0, result.output
    assert "tokenize-files: encoder alone" in result.stdout and "9 files of" in result.stdout
    assert "of tokens" not in result.stdout  # float32 is what others are compared with
    assert "after the first batch" not in result.stdout


def test_a_rate_after_the_first_batch_needs_batches_enough():
    moments = [(4 * batch, 100 + 2.0 * batch) for batch in range(1, 10)]
    assert steady_rate(moments) == 2.0
    assert steady_rate(moments[:8]) is None
    assert steady_rate([]) is None


def test_one_file_is_not_enough():
    from varcli.bench.config import BenchConfig

    with pytest.raises(ConfigError, match="two files"):
        BenchConfig(num_files=1)
