"""Run folders are found at any depth, read whatever state they are in, and refused with a word where they are none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from run_folders import write_run

from varcli.artifacts.lock import lock_folder
from varcli.artifacts.manifest import PLAN_NAME, write_manifest
from varcli.data.runs import find_runs, numbers_of, read_run, require_no_artifact, resolve_run
from varcli.errors import ArtifactError, DataError


def test_a_run_is_read_as_it_was_written(tmp_path):
    run = read_run(write_run(tmp_path / "a", done=60))
    assert (run.kind, run.config["depth"], run.inputs) == ("transformer", 4, {"codes": "abc"})
    assert [line["step"] for line in run.lines("train")] == [10, 20, 30, 40, 50, 60]
    assert len(run.lines("validation")) == 1
    assert run.last_write is not None and not run.is_running


def test_a_run_is_running_while_its_folder_is_held(tmp_path):
    folder = write_run(tmp_path / "a")
    with lock_folder(folder):
        assert read_run(folder).is_running
    assert not read_run(folder).is_running


def test_looking_changes_nothing(tmp_path):
    folder = write_run(tmp_path / "a")
    before = sorted(path.name for path in folder.iterdir())
    read_run(folder)
    assert sorted(path.name for path in folder.iterdir()) == before


def test_lines_that_no_training_writes_are_left_out(tmp_path):
    folder = write_run(tmp_path / "a", records=[{"kind": "train", "step": 5, "loss": 1.0}])
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(b'[1, 2]\n7\nnull\n{"kind": "train"}\n{"kind": "train", "step": "x"}\n\xff\xfe\n{"kind": "tra')
    assert read_run(folder).log == [{"kind": "train", "step": 5, "loss": 1.0}]


def test_only_finite_numbers_count():
    lines = [{"step": 1, "loss": "nan"}, {"step": 2, "loss": 1}, {"step": 3}, {"step": 4, "loss": True}]
    assert numbers_of(lines, "loss") == [(2, 1.0)]


def test_runs_are_found_below_and_the_rest_is_named(tmp_path):
    root = tmp_path / "runs"
    for name in ("a", "sweep/b", "sweep/deep/c"):
        write_run(root / name)
    (root / "a" / "samples").mkdir()
    (root / "empty").mkdir()
    (root / "other").mkdir()
    (root / "other" / "notes.txt").write_text("x")
    (root / ".hidden").mkdir()
    (root / "file").write_text("x")
    runs, others = find_runs(root)
    assert [run.relative_to(root).as_posix() for run in runs] == ["a", "sweep/b", "sweep/deep/c"]
    assert {path.name: what for path, what in others.items()} == {
        "empty": "it is empty",
        "other": "it holds no config.json",
    }
    assert find_runs(root / "a") == ([root / "a"], {})


def test_a_folder_that_may_not_be_read_stops_nothing(tmp_path, monkeypatch):
    for name in ("a", "secret"):
        write_run(tmp_path / "runs" / name)
    is_file = Path.is_file

    def refuse(path):
        if path.parent.name == "secret":
            raise PermissionError(13, "Permission denied")
        return is_file(path)

    monkeypatch.setattr(Path, "is_file", refuse)
    runs, others = find_runs(tmp_path / "runs")
    assert [run.name for run in runs] == ["a"]
    assert list(others.values()) == ["it cannot be read: Permission denied"]


def test_a_link_in_a_circle_ends(tmp_path):
    (tmp_path / "runs" / "x").mkdir(parents=True)
    (tmp_path / "runs" / "x" / "again").symlink_to(tmp_path / "runs")
    assert find_runs(tmp_path / "runs")[0] == []


@pytest.mark.parametrize(
    "content, words",
    [("{", "not valid JSON"), ("[]", "not a run's config"), ('{"model_type": "x"}', "not a run's config")],
)
def test_a_damaged_config_is_said(tmp_path, content, words):
    folder = write_run(tmp_path / "a")
    (folder / "config.json").write_text(content)
    with pytest.raises(ArtifactError, match=words):
        read_run(folder)


def test_what_is_no_run_is_said(tmp_path):
    with pytest.raises(ArtifactError, match="does not exist"):
        read_run(tmp_path / "gone")
    with pytest.raises(ArtifactError, match="is empty"):
        read_run(tmp_path)
    (tmp_path / "begun").mkdir()
    with lock_folder(tmp_path / "begun"), pytest.raises(ArtifactError, match="being begun"):
        read_run(tmp_path / "begun")


def test_a_name_means_a_run_in_runs_or_tokenizers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "runs" / "d4")
    write_run(tmp_path / "tokenizers" / "mine", kind="tokenizer")
    assert resolve_run("d4").as_posix() == "runs/d4"
    assert resolve_run("mine").as_posix() == "tokenizers/mine"
    assert resolve_run("runs/d4").as_posix() == "runs/d4"
    with pytest.raises(ArtifactError, match="unknown run") as caught:
        resolve_run("d5")
    assert "d4" in caught.value.hint


def test_inputs_of_another_kind_are_no_error(tmp_path):
    folder = write_run(tmp_path / "a")
    stored = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**stored, "inputs": 3, "made_by": []}))
    assert read_run(folder).inputs == {}


@pytest.mark.parametrize("kind", ["codes", "samples", "tokenizer"])
def test_what_varcli_wrote_is_told_from_a_folder_of_images(tmp_path, kind):
    write_run(tmp_path / "run")
    for name in ("one", "model/tokenizer"):
        (tmp_path / name).mkdir(parents=True)
        write_manifest(tmp_path / name, kind, {}, files=[])
    for name, what in (("run", "a run"), ("one", f"a {kind} folder"), ("model", "a model")):
        with pytest.raises(DataError, match=f"is {what} of varcli, but a folder of images is needed") as caught:
            require_no_artifact(tmp_path / name)
        assert "ROOT/CLASS/IMAGE" in caught.value.hint
    (tmp_path / "begun").mkdir()
    plan = {"downsampling": 8} if kind == "codes" else {"seed": 0}
    (tmp_path / "begun" / PLAN_NAME).write_text(json.dumps(plan))
    begun = "codes" if kind == "codes" else "samples"
    with pytest.raises(DataError, match=f"is an unfinished {begun} folder of varcli") as caught:
        require_no_artifact(tmp_path / "begun")
    assert "the command that began this one goes on with it" in caught.value.hint
    assert find_runs(tmp_path / "begun")[1] == {tmp_path / "begun": f"it is an unfinished {begun} folder"}
    (tmp_path / "images").mkdir()
    for name in ("config.json", "manifest.json"):  # of somebody else
        (tmp_path / "images" / name).write_text('{"kind": "photos"}')
    require_no_artifact(tmp_path / "images")
    require_no_artifact(tmp_path / "nothing")
