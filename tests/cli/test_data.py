"""`varcli data`."""

from __future__ import annotations

import json
import os

import pytest
from typer.testing import CliRunner

from varcli.cli.app import app

runner = CliRunner()


def test_emoji64_is_unpacked_and_counted(tmp_path):
    out = tmp_path / "emoji64"
    result = runner.invoke(app, ["data", "emoji64", "--out", str(out)])
    assert result.exit_code == 0
    assert "Food & Drink" in result.stdout
    assert "varcli tokenize" in result.stderr
    again = runner.invoke(app, ["data", "emoji64", "--out", str(out), "--json"])
    value = json.loads(again.stdout)
    assert value["images"] == 5297
    assert value["classes"]["Flags"] == {"train": 505, "val": 42}


def test_a_folder_is_described_and_skips_are_told(tiny_images):
    (tiny_images / "train" / "cat" / "x.png").symlink_to("/nowhere")
    result = runner.invoke(app, ["data", str(tiny_images)])
    assert result.exit_code == 0
    assert "21 images in 3 classes" in result.stdout
    assert "skipped train/cat/x.png: link to nothing" in result.stderr


def test_one_class_is_counted_as_one(tiny_images):
    result = runner.invoke(app, ["data", str(tiny_images / "train" / "cat")])
    assert "5 images in 1 class\n" in result.stdout and "1 classes" not in result.stdout


@pytest.mark.skipif(os.name == "nt", reason="file names hold no newlines there")
@pytest.mark.parametrize("command", ["data", "info"])
def test_class_names_with_newlines_break_no_line(tiny_images, command):
    for split in ("train", "val"):
        (tiny_images / split / "cat").rename(tiny_images / split / "cat\nand\tdog")
    result = runner.invoke(app, [command, str(tiny_images)])
    assert "cat\\x0aand\\x09dog" in result.stdout
    assert not any(line.startswith("and") for line in result.stdout.splitlines())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["emoji6"], "unknown dataset or folder `emoji6`"),
        (["{tmp}/none"], "there is no folder"),
        (["{tmp}"], "holds nothing"),
        (["{tmp}", "--out", "x"], "`--out` is for unpacking"),
    ],
)
def test_what_cannot_be_shown_is_one_error_with_a_hint(tmp_path, arguments, message):
    result = runner.invoke(app, ["data", *(argument.replace("{tmp}", str(tmp_path)) for argument in arguments)])
    assert result.exit_code == 1
    assert message in result.stderr
    assert "hint:" in result.stderr
    assert "Traceback" not in result.output
