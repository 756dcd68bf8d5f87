"""`varcli pull` on the command line; what it fetches is tested with `interop/pull.py`."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from varcli.cli.app import app
from varcli.interop.pull import PullResult
from varcli.interop.releases import RELEASES

runner = CliRunner()


def test_help_names_every_release():
    text = runner.invoke(app, ["pull", "--help"], env={"COLUMNS": "200", "NO_COLOR": "1"}).stdout
    assert all(name in text for name in RELEASES)


def test_a_name_that_is_no_release_is_one_error_with_those_there_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = runner.invoke(app, ["pull", "var-16"])
    assert result.exit_code == 1
    assert "error: unknown released model `var-16`" in result.stderr and "var-d16" in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("folder", ["models/var-d16", "elsewhere"])
def test_a_model_that_is_there_is_told_with_the_next_command(folder, monkeypatch):
    def found(name, out, on_step):
        return PullResult(
            name=name, folder=Path(folder), is_new=False, release=RELEASES[name], sha256={}, downloads=Path("cache")
        )

    monkeypatch.setattr("varcli.interop.pull.pull_model", found)
    result = runner.invoke(app, ["pull", "var-d16"])
    assert result.stdout == f"{folder} is there and whole: nothing to do\n"
    model = "var-d16" if folder == "models/var-d16" else folder
    assert result.stderr == f"next: varcli sample --model {model} --class 207\n"
