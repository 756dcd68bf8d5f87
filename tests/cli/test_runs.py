"""`varcli runs`: the list, the comparison, and bad input."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from run_folders import write_run
from typer.testing import CliRunner

from varcli.artifacts.lock import lock_folder
from varcli.cli.app import app

runner = CliRunner()


@pytest.fixture
def place(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "runs" / "first", done=60)
    write_run(tmp_path / "runs" / "second", learning_rate=0.002, loss=3.0)
    write_run(tmp_path / "tokenizers" / "mine", kind="tokenizer", depth=None, tokenizer={"width": 64})
    (tmp_path / "runs" / "foreign").mkdir()
    (write_run(tmp_path / "runs" / "torn") / "config.json").write_text('{"kind": "tr')
    return tmp_path


def test_runs_are_listed_with_what_is_wrong_beside(place):
    with lock_folder(place / "runs" / "second"):
        result = runner.invoke(app, ["runs"])
    assert result.exit_code == 0, result.stderr
    lines = {line.split()[0]: line for line in result.stdout.splitlines()}
    assert set(lines) >= {"runs/first", "runs/second", "tokenizers/mine"}
    for text in ("transformer", "d4 w256", "60/100", "4.3 @ 50", "80", "6s", "stopped", "ago"):
        assert text in lines["runs/first"]
    assert "running" in lines["runs/second"] and "finished" in lines["tokenizers/mine"]
    assert result.stderr.splitlines()[0] == "runs/foreign: it is empty"
    assert "runs/torn/config.json" in result.stderr.splitlines()[1]


def test_the_list_as_json_has_all_fields_and_ages(place):
    value = json.loads(runner.invoke(app, ["runs", "runs", "--json"]).stdout)
    first = next(run for run in value["runs"] if run["name"] == "runs/first")
    assert (first["step"], first["steps"], first["best_step"], first["width"]) == (60, 100, 50, 256)
    assert 0 <= first["age_seconds"] < 600
    assert set(value["others"]) == {"runs/foreign", "runs/torn"}
    assert len(value["runs"]) == 2  # of runs/ only


def test_one_run_is_a_list_of_one(place):
    result = runner.invoke(app, ["runs", "first"])
    assert result.exit_code == 0
    assert [line.split()[0] for line in result.stdout.splitlines()[2:]] == ["runs/first"]


def test_curves_find_a_run_by_its_name_as_well(place):
    result = runner.invoke(app, ["curves", "first", "--json"])
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout) == {"curves": "runs/first/curves.png"}


def test_two_runs_are_compared(place):
    result = runner.invoke(app, ["runs", "first", "runs/second", "--over", "hours", "--out", "both.png"])
    assert result.exit_code == 0, result.stderr
    assert "learning_rate         0.001   0.002" in result.stdout
    assert "depth" not in result.stdout
    assert Image.open(place / "both.png").format == "PNG"
    value = json.loads(runner.invoke(app, ["runs", "first", "second", "--json"]).stdout)
    assert value["settings"] == {"learning_rate": {"runs/first": 0.001, "runs/second": 0.002}}
    assert value["numbers"]["steps"] == {"runs/first": 60, "runs/second": 100}
    assert (place / value["plot"]).is_file()


def test_without_any_run_it_says_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = runner.invoke(app, ["runs"])
    assert (result.exit_code, result.stdout) == (0, "no runs in runs/ or tokenizers/\n")
    assert json.loads(runner.invoke(app, ["runs", "--json"]).stdout) == {"runs": [], "others": {}}


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["nothing"], "unknown run or folder `nothing`"),
        (["first", "nothing"], "unknown run or folder `nothing`"),
        (["first", "runs/foreign"], "`runs/foreign` is no run: it is empty"),
        (["first", "runs/torn"], "not valid JSON"),
        (["first", "runs/first"], "again"),
        (["first", "second", "--over", "days"], "unknown axis `days`"),
        (["--out", "x.png"], "is for comparing runs"),
        (["first", "second", "--out", "codes.txt/x.png"], "codes.txt"),
        (["codes.txt"], "not a folder"),
    ],
)
def test_bad_input_is_one_error_and_writes_nothing(place, arguments, words):
    (place / "codes.txt").write_text("x")
    result = runner.invoke(app, ["runs", *arguments])
    assert result.exit_code == 1, result.stdout
    assert words in result.stderr
    assert not list(place.glob("*.png"))
    assert "Traceback" not in result.stderr + result.stdout


def test_no_word_of_torch_is_spoken(place):
    code = "import sys; from varcli.cli.app import app; app(['runs', 'first', 'second'], standalone_mode=False)"
    code += "; sys.exit('torch' in sys.modules)"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": str(root)}, capture_output=True)
    assert done.returncode == 0, done.stderr
