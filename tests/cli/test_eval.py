"""`varcli eval`."""

from __future__ import annotations

import json

import pytest
from small_sets import draw, write_pngs
from typer.testing import CliRunner

from varcli.cli.app import app

runner = CliRunner()


@pytest.fixture
def paths(tmp_path):
    for split, seed in (("train", 1), ("val", 2)):
        for name in ("ant", "bee"):
            write_pngs(tmp_path / "real" / split / name, draw(4, seed=seed))
    return write_pngs(tmp_path / "samples", draw(6, seed=3)), tmp_path / "real"


def run(*arguments: object):
    return runner.invoke(app, ["eval", *map(str, arguments), "--features", "lite0"])


def test_the_table_has_the_floor_beside_the_numbers(paths):
    samples, real = paths
    result = run(samples, "--ref", real)
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["metric", "samples", "real", "images", "better"]
    assert [line.split()[0] for line in lines[2:7]] == [
        *("kid_lite0", "precision_lite0", "recall_lite0", "fd_lite0", "is_lite0")
    ]
    assert f"reference:   {real}, val images; 8 images, 32 x 32" in result.stdout
    assert "these numbers are not FID" in result.stderr
    assert "--inception-weights" in result.stderr


def test_json_has_each_number_under_its_name(paths):
    samples, real = paths
    result = run(samples, "--ref", real, "--json", "--no-floor", "--metrics", "kid, coverage")
    value = json.loads(result.stdout)
    assert isinstance(value["kid_lite0"], float)
    assert 0 <= value["coverage_lite0"] <= 1
    assert value["floor"] is None and value["skipped"] == {}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{tmp}/none"], "there are no samples"),
        (["{tmp}/samples"], "do not say which real images"),
        (["{tmp}/samples", "--ref", "{tmp}/none"], "there is no reference"),
        (["{tmp}/samples", "--ref", "{tmp}/real", "--metrics", "fid"], "pass --inception-weights"),
        (["{tmp}/samples", "--ref", "{tmp}/real", "--device", "cud"], "unknown device"),
    ],
)
def test_what_cannot_be_evaluated_is_one_error_with_a_hint(paths, tmp_path, arguments, message):
    result = run(*(argument.replace("{tmp}", str(tmp_path)) for argument in arguments))
    assert result.exit_code == 1
    assert message in result.stderr
    assert "hint:" in result.stderr
    assert "Traceback" not in result.output
