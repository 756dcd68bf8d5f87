"""Files appear whole or not at all."""

from __future__ import annotations

import errno
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from varcli.artifacts.verify import read_tensors
from varcli.artifacts.write import (
    atomic_folder,
    atomic_path,
    prepare_folder,
    write_arrays,
    write_json,
    write_tensors,
    write_text,
)
from varcli.errors import ArtifactError


def test_a_failing_writer_leaves_the_old_file_and_no_temporary(tmp_path):
    path = tmp_path / "result.json"
    write_json(path, {"a": 1})
    with pytest.raises(RuntimeError), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError("killed")
    assert path.read_text() == '{\n "a": 1\n}\n'
    assert [entry.name for entry in tmp_path.iterdir()] == ["result.json"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_a_full_or_broken_disk_is_one_error_and_keeps_the_old_file(tmp_path, monkeypatch, call, code):
    path = tmp_path / "weights.safetensors"
    write_tensors(path, {"a": torch.zeros(3)})

    def fail(*_):
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(ArtifactError, match=r"cannot write .*weights\.safetensors"):
            write_tensors(path, {"a": torch.ones(3)})
    assert torch.equal(read_tensors(path)["a"], torch.zeros(3))
    assert len(list(tmp_path.iterdir())) == 1


def test_tensors_come_back_with_their_types(tmp_path):
    tensors = {"half": torch.randn(2, 3).half(), "codes": torch.arange(4).to(torch.uint16), "view": torch.eye(3).T}
    write_tensors(tmp_path / "t.safetensors", tensors)
    for name, tensor in read_tensors(tmp_path / "t.safetensors").items():
        assert tensor.dtype == tensors[name].dtype
        assert torch.equal(tensor, tensors[name])


def test_object_arrays_are_never_written(tmp_path):
    with pytest.raises(ArtifactError, match="Python objects"):
        write_arrays(tmp_path / "a.npz", {"a": np.array([{}], dtype=object)})
    assert list(tmp_path.iterdir()) == []


def test_an_output_folder_is_proved_before_any_compute(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="is a file"):
        prepare_folder(tmp_path / "file")
    with pytest.raises(ArtifactError, match=r"B free, but about 1,000,000,000\.0 GB are needed"):
        prepare_folder(tmp_path / "out", need_bytes=10**18)


@pytest.mark.parametrize(
    ("free", "need", "said"),
    [
        (10_990_000, 11_010_000, "has 10.9 MB free, but about 11.1 MB are needed"),
        (999_990_000, 1_000_000_001, "has 999.9 MB free, but about 1.1 GB are needed"),
        (10_960_001, 10_960_002, "has 10.9 MB free, but about 11.0 MB are needed"),
    ],
)
def test_free_and_needed_bytes_never_look_equal(tmp_path, monkeypatch, free, need, said):
    usage = shutil.disk_usage(tmp_path)._replace(free=free)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ArtifactError, match=re.escape(said)):
        prepare_folder(tmp_path, need_bytes=need)


def test_leftovers_of_a_killed_writer_are_removed(tmp_path):
    (tmp_path / ".tmp-abc.png").write_text("half")
    prepare_folder(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_takes_its_place_whole(tmp_path):
    for text in ("first", "second"):
        with atomic_folder(tmp_path / "made") as temporary:
            write_text(temporary / f"{text}.txt", text)
        assert [path.name for path in (tmp_path / "made").iterdir()] == [f"{text}.txt"]
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_a_folder_that_fails_leaves_the_old_one(tmp_path):
    with atomic_folder(tmp_path / "made") as temporary:
        write_text(temporary / "old.txt", "old")
    with pytest.raises(ValueError, match="halfway"), atomic_folder(tmp_path / "made") as temporary:
        write_text(temporary / "new.txt", "new")
        raise ValueError("halfway")
    assert [path.name for path in tmp_path.rglob("*")] == ["made", "old.txt"]


def test_leftovers_of_a_killed_run_are_swept_unless_somebody_may_still_write(tmp_path):
    (tmp_path / ".tmp-folder").mkdir()
    (tmp_path / ".tmp-folder" / "half").write_text("half")
    (tmp_path / ".tmp-file").write_text("half")
    prepare_folder(tmp_path, sweep=False)
    assert len(list(tmp_path.iterdir())) == 2
    prepare_folder(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_folder_whose_replacement_was_killed_halfway_comes_back(tmp_path, monkeypatch):
    def killed(source, target):
        rename(source, target)
        if Path(target).name.endswith(".old"):
            raise KeyboardInterrupt

    for content in ("first", "second"):
        with atomic_folder(tmp_path / "made") as temporary:
            write_text(temporary / "text", content)
    rename = os.replace
    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "made") as temporary:
        write_text(temporary / "text", "third")
    monkeypatch.undo()
    assert not (tmp_path / "made").exists()
    prepare_folder(tmp_path)
    assert (tmp_path / "made" / "text").read_text() == "second"
    assert [path.name for path in tmp_path.iterdir()] == ["made"]
