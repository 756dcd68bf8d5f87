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
        (["{tmp}/samples", "--ref", "{tmp}/real", "--html", "{tmp}"], "is a folder"),
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


def test_html_leaves_a_page_with_pictures_and_json_has_the_counts(paths, tmp_path):
    samples, real = paths
    result = run(samples, "--ref", real, "--metrics", "kid", "--html", tmp_path / "out" / "report.html", "--json")
    assert result.exit_code == 0
    assert "report.html" in result.stderr
    assert (tmp_path / "out" / "report.html").read_text(encoding="utf-8").count("<img") == 6 * 6
    value = json.loads(result.stdout)
    assert value["class_counts"] == {} and value["published"] == []


def test_a_published_protocol_is_set_beside_papers(capsys):
    from varcli.cli.eval import show
    from varcli.metrics.published import published_at
    from varcli.metrics.result import EvalResult

    sample = {"path": "mine.npz", "count": 50_000, "width": 256, "height": 256, "preparation": "as they are"}
    show(
        EvalResult(
            metrics={"fid": 2.2},
            skipped={},
            floor={},
            floor_images=None,
            samples=sample,
            reference=None,
            features={"network": "inception", "weights_sha256": "0" * 64},
            warnings=(),
            versions={},
            published=published_at(256),
        )
    )
    shown = capsys.readouterr().out
    assert "of 50,000 samples each (this result: 50,000)" in shown
    lines = [line for line in shown.splitlines() if line.startswith(("VAR", "this result", "real images"))]
    assert lines[-3].startswith("VAR") and any("mine.npz" in line for line in lines)
