"""No command that reads images takes for them what varcli wrote: samples, finished or not, codes, runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image
from run_folders import write_run
from typer.testing import CliRunner

from varcli.artifacts.manifest import PLAN_NAME, write_manifest
from varcli.cli.app import app
from varcli.tokenizer.store import save_tokenizer

COMMANDS = (
    "tokenize FOLDER --out out",
    "train-tokenizer FOLDER --out out",
    "data FOLDER",
    "reference build FOLDER --out out.npz",
    "eval --tokenizer tokenizer FOLDER",
    "eval --ref FOLDER pictures",
    "eval --ref pictures FOLDER",
)


@pytest.fixture
def place(tmp_path: Path, tiny_tokenizer, monkeypatch) -> Path:
    """A working folder with images in pictures/, a tokenizer, and what varcli may have written, images in all of it."""
    monkeypatch.chdir(tmp_path)
    save_tokenizer(tmp_path / "tokenizer", tiny_tokenizer)
    write_run(tmp_path / "run")
    for name in ("pictures/a", "pictures/b", "run/a", "run/b", "unfinished samples", "unfinished codes", "codes"):
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
        for number in range(2):
            Image.new("RGB", (32, 32), (9 * number, 0, 0)).save(tmp_path / name / f"0000-0000{number}.png")
    for name, plan in (("samples", {"seed": 0}), ("codes", {"downsampling": 8})):
        (tmp_path / f"unfinished {name}" / PLAN_NAME).write_text(json.dumps(plan))
    write_manifest(tmp_path / "codes", "codes", {}, files=[])
    return tmp_path


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("folder", ["unfinished samples", "unfinished codes", "codes", "run"])
def test_what_varcli_wrote_is_refused_as_a_folder_of_images(place: Path, command: str, folder: str):
    before = sorted(place.rglob("*"))
    done = CliRunner().invoke(app, [folder if word == "FOLDER" else word for word in command.split()])
    assert done.exit_code == 1, done.output
    what = "a run" if folder == "run" else f"{'an' if folder.startswith('un') else 'a'} {folder} folder"
    assert f"`{folder}` is {what}" in done.stderr
    assert done.stderr.count("error: ") == 1
    assert sorted(place.rglob("*")) == before
