"""The demo, on a hundredth of its images: it ends with pictures and a table, and the commands it prints are its own."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from varcli.cli.app import app
from varcli.data.emoji import EMOJI64_CLASSES, unpack_emoji64
from varcli.errors import InterruptedRun
from varcli.training import TrainConfig

OPTIONS = ["--steps", "3", "--per-class", "2", "--device", "cpu"]
PER_CLASS = {"train": 6, "val": 4}  # images kept of the data set


@pytest.fixture(scope="module")
def few_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small choice of emoji64, as an image tree."""
    whole = unpack_emoji64(tmp_path_factory.mktemp("whole") / "emoji64").folder
    few = tmp_path_factory.mktemp("few") / "emoji64"
    for split, count in PER_CLASS.items():
        for name in EMOJI64_CLASSES:
            (few / split / name).mkdir(parents=True)
            for path in sorted((whole / split / name).iterdir())[:count]:
                shutil.copy(path, few / split / name)
    return few


@pytest.fixture
def place(few_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder in which the demo finds few images."""

    def unpack(out: Path) -> None:
        shutil.copytree(few_images, out, dirs_exist_ok=True)

    monkeypatch.setattr("varcli.report.demo.unpack_emoji64", unpack)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _run(*arguments: str):
    done = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done


def test_demo_ends_with_pictures_and_a_table_and_its_commands_find_their_work_done(place: Path):
    first = _run("demo", *OPTIONS)
    for row in ("kid_lite0", "real images", "comparison.png", "next:"):
        assert row in first.stdout
    assert Image.open(place / "demo" / "comparison.png").height > 10 * 64
    commands = [shlex.split(line) for line in re.findall(r"^ +\$ (.*)$", first.stderr, re.MULTILINE)]
    assert [words[1] for words in commands] == ["data", "tokenize", "train", "sample", "sample", "eval", "eval"]
    before = _files(place)
    for words in commands[1:]:
        done = _run(*words[1:], "--json", *(["--device", "cpu"] if "--device" not in words else []))
        if words[1] == "train":
            assert json.loads(done.stdout)["steps"] == 3
        if words[1] == "sample":
            assert json.loads(done.stdout)["drawn"] == 0
    assert _files(place) == before

    again = json.loads(_run("demo", *OPTIONS, "--json").stdout)
    assert again["steps"] == 3
    assert set(again["metrics"]) == {"trained", "emoji64", "real images"}
    assert set(again["metrics"]["trained"]) == set(again["metrics"]["emoji64"])


def _files(folder: Path) -> dict[str, bytes]:
    """Pictures, weights and codes by path; not manifests and logs, which note when they were written."""
    found = (path for path in folder.rglob("*") if path.suffix in (".png", ".safetensors"))
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def test_demo_chooses_its_steps_by_the_minutes_given(place: Path, monkeypatch: pytest.MonkeyPatch):
    asked = []

    def train(codes: Path, out: Path, config: TrainConfig, **_: object) -> None:
        asked.append(config.steps)
        raise InterruptedRun("that is all the test needs")

    monkeypatch.setattr("varcli.report.demo.train_transformer", train)
    for minutes in ("0.001", "1000"):
        done = CliRunner().invoke(app, ["demo", "--minutes", minutes, "--device", "cpu"])
        assert done.exit_code == 75
    assert asked == [20, 3000]  # the least and the most


@pytest.mark.parametrize(
    "options, said",
    [
        (["--minutes", "0"], "minutes must be above 0, but is 0"),
        (["--steps", "0"], "`--steps` must be 1 or more, but is 0"),
        (["--per-class", "-2"], "`--per-class` must be 1 or more, but is -2"),
    ],
)
def test_demo_of_nothing_is_refused_before_it_starts(place: Path, options: list[str], said: str):
    done = CliRunner().invoke(app, ["demo", *options])
    assert done.exit_code == 1
    assert said in done.stderr
    assert list(place.iterdir()) == []
