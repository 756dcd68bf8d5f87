"""Files from strangers: what torch.save writes is read, and whatever could run code or lies about itself is refused."""

from __future__ import annotations

import argparse
import io
import os
import pickle
import struct
import tarfile
import zipfile

import numpy as np
import pytest
import torch

from varcli.artifacts.foreign import check_archive, read_foreign, read_pickled_tensors
from varcli.artifacts.write import write_tensors
from varcli.errors import ArtifactError, UnsafeFileError

STATE = {"a": torch.arange(6.0).view(2, 3), "b": torch.arange(4), "notes": {"epoch": 3, "names": ["x", "y"]}}


@pytest.fixture
def honest(tmp_path):
    path = tmp_path / "honest.pth"
    torch.save(STATE, path)
    return path


class RunsCommand:
    """Unpickled carelessly, it makes a file appear."""

    def __init__(self, proof):
        self.proof = proof

    def __reduce__(self):
        return os.system, (f"touch '{self.proof}'",)


def rewrite(source, target, change=lambda name, data: data, extra=(), **options):
    """Copy an archive member by member; `change` returns new bytes, or None to leave a member out."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for member in old.infolist():
            data = change(member.filename, old.read(member))
            if data is not None:
                new.writestr(zipfile.ZipInfo(member.filename), data, **options)
        for name, data in extra:
            new.writestr(zipfile.ZipInfo(name), data, **options)
    return target


def in_pickle(change):
    return lambda name, data: change(data) if name.endswith("/data.pkl") else data


def test_what_torch_saves_is_read(honest):
    state = read_foreign(honest)
    assert torch.equal(state["a"], STATE["a"]) and torch.equal(state["b"], STATE["b"])
    assert state["notes"] == STATE["notes"]


def test_every_plain_kind_of_tensor_is_read(tmp_path):
    kinds = (torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int8, torch.uint8, torch.bool)
    state = {str(kind): torch.ones(3, 2).to(kind) for kind in kinds}
    state |= {"empty": torch.empty(0), "scalar": torch.tensor(2.0), "tied": state["torch.float16"]}
    state |= {
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "part": torch.arange(10)[2:5],
        "turned": torch.ones(2, 3).T,
    }
    torch.save(state, tmp_path / "kinds.pth")
    loaded = read_foreign(tmp_path / "kinds.pth")
    assert list(loaded) == list(state)
    for name, tensor in state.items():
        assert loaded[name].dtype == tensor.dtype and torch.equal(loaded[name].float(), tensor.float())


def test_safetensors_are_told_by_their_bytes_not_their_name(tmp_path):
    write_tensors(tmp_path / "weights.pth", {"a": torch.ones(2)})
    assert torch.equal(read_foreign(tmp_path / "weights.pth")["a"], torch.ones(2))
    with pytest.raises(ArtifactError, match=r"is a safetensors file, not a \.pth file"):
        read_pickled_tensors(tmp_path / "weights.pth")


def test_links_are_followed(honest, tmp_path):
    (tmp_path / "link.pth").symlink_to(honest)
    assert torch.equal(read_foreign(tmp_path / "link.pth")["a"], STATE["a"])


def test_an_archive_is_described_without_unpickling(tmp_path):
    proof = tmp_path / "proof"
    torch.save({"head.weight": torch.ones(3), "evil": RunsCommand(proof)}, tmp_path / "evil.pth")
    archive = check_archive(tmp_path / "evil.pth")
    assert "head.weight" in archive.names and archive.tensor_bytes == 12
    assert any("system" in asked for asked in archive.globals)
    assert not proof.exists()


# -- code ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hide", ["value", "key", "discarded", "deep"])
def test_a_command_in_a_pickle_does_not_run(tmp_path, hide):
    proof = tmp_path / "proof"
    evil = RunsCommand(proof)
    state = {
        "value": {"a": torch.ones(2), "evil": evil},
        "key": {(1, evil): torch.ones(2)},
        "discarded": {"a": torch.ones(2), "optimizer": {"state": [evil, None]}},
        "deep": {"a": {"b": [{"c": (evil,)}]}},
    }[hide]
    path = tmp_path / "evil.pth"
    torch.save(state, path)
    with pytest.raises(UnsafeFileError, match=r"asks for `(posix|nt)\.system`") as raised:
        read_foreign(path)
    assert raised.value.exit_code == 4
    assert not proof.exists()


class Calls:
    """Pickles as a call of any function."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (Calls(exec, "raise SystemExit"), "exec"),
        (Calls(getattr, "text", "upper"), "getattr"),
        (Calls(torch.hub.load, "x/y", "z"), "torch.hub.load"),
        (argparse.Namespace(depth=16), "argparse.Namespace"),
        (torch.nn.Linear(2, 2), "torch.nn.modules.linear.Linear"),
        (np.zeros(3), "numpy"),
    ],
)
def test_anything_but_tensors_and_plain_values_is_refused_by_name(tmp_path, value, named):
    torch.save({"a": torch.ones(2), "args": value}, tmp_path / "other.pth")
    with pytest.raises(UnsafeFileError, match=named) as raised:
        read_foreign(tmp_path / "other.pth")
    assert "safetensors" in raised.value.hint


def test_a_second_pickle_behind_the_first_is_refused(honest, tmp_path):
    path = rewrite(honest, tmp_path / "second.pth", in_pickle(lambda data: data + pickle.dumps(1, protocol=2)))
    with pytest.raises(UnsafeFileError, match="bytes are hidden behind it"):
        read_foreign(path)


# -- archives that torch.save does not write -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "extra",
    [
        "honest/code/__torch__.py",
        "honest/constants.pkl",
        "honest/data/../../x",
        "other/data.pkl",
        "honest/data/1.bin",
        "x",
    ],
)
def test_a_foreign_member_is_refused(honest, tmp_path, extra):
    path = rewrite(honest, tmp_path / "extra.pth", extra=[(extra, b"1")])
    with pytest.raises(UnsafeFileError, match=r"torch\.save never writes|not one folder"):
        read_foreign(path)


@pytest.mark.parametrize("root", ["..", "a\\b", "C:", "/abs"])
def test_a_root_that_is_no_plain_name_is_refused(honest, tmp_path, root):
    path = tmp_path / "root.pth"
    with zipfile.ZipFile(honest) as old, zipfile.ZipFile(path, "w") as new:
        for member in old.infolist():
            new.writestr(root + member.filename.removeprefix("honest"), old.read(member))
    with pytest.raises(UnsafeFileError):
        read_foreign(path)


def test_compressed_members_are_refused(honest, tmp_path):
    path = rewrite(honest, tmp_path / "deflated.pth", compress_type=zipfile.ZIP_DEFLATED)
    with pytest.raises(UnsafeFileError, match="is compressed"):
        read_foreign(path)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_name_that_stands_twice_is_refused(honest, tmp_path):
    with zipfile.ZipFile(honest) as archive:
        data = archive.read("honest/data.pkl")
    path = rewrite(honest, tmp_path / "twice.pth", extra=[("honest/data.pkl", data)])
    with pytest.raises(UnsafeFileError, match="twice"):
        read_foreign(path)


def test_a_member_whose_local_name_differs_is_refused(honest, tmp_path):
    data = honest.read_bytes()
    start = data.index(b"honest/data.pkl")
    path = tmp_path / "renamed.pth"
    path.write_bytes(data[:start] + b"honest/data.pkX" + data[start + 15 :])
    with pytest.raises(UnsafeFileError, match=r"header of `honest/data\.pkl` is wrong"):
        read_foreign(path)


def test_a_wrong_checksum_is_refused(honest, tmp_path):
    data = bytearray(honest.read_bytes())
    data[data.index(struct.pack("<6f", *range(6)))] ^= 1
    (tmp_path / "flipped.pth").write_bytes(data)
    with pytest.raises(UnsafeFileError, match="checksum or header of `honest/data/0` is wrong"):
        read_foreign(tmp_path / "flipped.pth")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: b"PK\x03\x04" + data, "bytes stand before the first|damaged or forged"),
        (lambda data: data + b"trailing", "goes on after its end"),
        (lambda data: data[:-2] + struct.pack("<H", 4) + b"note", "goes on after its end"),
    ],
)
def test_bytes_around_the_archive_are_refused(honest, tmp_path, change, message):
    (tmp_path / "around.pth").write_bytes(change(honest.read_bytes()))
    with pytest.raises(UnsafeFileError, match=message):
        read_foreign(tmp_path / "around.pth")


def test_too_many_members_are_refused(tmp_path):
    path = tmp_path / "many.pth"
    with zipfile.ZipFile(path, "w") as archive:
        for index in range(20_001):
            archive.writestr(zipfile.ZipInfo(f"many/data/{index}"), b"")
    with pytest.raises(UnsafeFileError, match="20,001 members"):
        read_foreign(path)


# -- lies about sizes ------------------------------------------------------------------------------------------------


def test_data_shorter_than_claimed_is_refused(honest, tmp_path):
    path = rewrite(honest, tmp_path / "short.pth", lambda name, data: data[:8] if name.endswith("data/0") else data)
    with pytest.raises(UnsafeFileError, match="claims 24 bytes for the data `0`, which has 8"):
        read_foreign(path)


def test_a_huge_claim_is_refused(honest, tmp_path):
    grown = in_pickle(lambda data: data.replace(b"K\x06tq", b"J\xff\xff\xff\x7ftq", 1))
    with pytest.raises(UnsafeFileError, match="claims 8,589,934,588 bytes"):
        read_foreign(rewrite(honest, tmp_path / "huge.pth", grown))


def test_data_that_the_pickle_does_not_name_is_refused(honest, tmp_path):
    path = rewrite(honest, tmp_path / "hidden.pth", extra=[("honest/data/7", b"payload")])
    with pytest.raises(UnsafeFileError, match="claims 0 bytes for the data `7`"):
        read_foreign(path)


def test_a_tensor_larger_than_its_data_is_refused(tmp_path):
    torch.save({"a": torch.zeros(1).expand(1000, 1000)}, tmp_path / "expanded.pth")
    with pytest.raises(UnsafeFileError, match=r"shape \(1000, 1000\) is not plain"):
        read_foreign(tmp_path / "expanded.pth")


def test_many_tensors_over_the_same_data_are_refused(tmp_path):
    data = torch.zeros(1000)
    torch.save({str(index): data[:999] for index in range(100)}, tmp_path / "shared.pth")
    with pytest.raises(UnsafeFileError, match="share bytes"):
        read_foreign(tmp_path / "shared.pth")


@pytest.mark.filterwarnings("ignore:Validating sparse")
def test_sparse_tensors_are_refused(tmp_path):
    torch.save({"a": torch.ones(3).to_sparse()}, tmp_path / "sparse.pth")
    with pytest.raises(UnsafeFileError, match="is not plain"):
        read_foreign(tmp_path / "sparse.pth")


def test_a_pickle_of_many_shared_lists_is_read_in_no_time(tmp_path):
    nested: list = ["x"]
    for _ in range(60):  # 2**60 entries, were each list walked as often as it is named
        nested = [nested, nested]
    torch.save({"a": torch.ones(2), "nested": nested}, tmp_path / "nested.pth")
    assert torch.equal(read_foreign(tmp_path / "nested.pth")["a"], torch.ones(2))


# -- not the file at all ---------------------------------------------------------------------------------------------


def tar_bytes() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("storages"))
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (b"", ArtifactError, "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", ArtifactError, "git-lfs pointer"),
        (b"<!DOCTYPE html>\n<html><body>Sign in</body></html>", ArtifactError, "is a web page"),
        (b"\n <html lang=en>", ArtifactError, "is a web page"),
        (pickle.dumps({"a": 1}, protocol=2), UnsafeFileError, "torch's old format"),
        (pickle.dumps({"a": 1}, protocol=0), UnsafeFileError, "no format that varcli reads"),
        (b"\x1f\x8b\x08\x00rest", UnsafeFileError, "tar or gzip"),
        (tar_bytes(), UnsafeFileError, "tar or gzip"),
        (b"\x89PNG\r\n\x1a\n", UnsafeFileError, "no format that varcli reads"),
        (struct.pack("<Q", 40) + b'{"a": 1}', ArtifactError, "safetensors"),
    ],
)
def test_other_files_get_one_clear_error(tmp_path, data, error, message):
    (tmp_path / "weights.pth").write_bytes(data)
    with pytest.raises(error, match=message) as raised:
        read_foreign(tmp_path / "weights.pth")
    assert type(raised.value) is error


def test_torchs_old_format_is_refused(tmp_path):
    torch.save(STATE, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(UnsafeFileError, match="torch's old format"):
        read_foreign(tmp_path / "old.pth")


@pytest.mark.parametrize("share", [0.2, 0.5, 0.99])
def test_a_download_that_stopped_is_said_to_be_not_whole(honest, tmp_path, share):
    data = honest.read_bytes()
    (tmp_path / "part.pth").write_bytes(data[: int(len(data) * share)])
    with pytest.raises(ArtifactError, match=r"is not whole: .* the end of the archive is missing") as raised:
        read_foreign(tmp_path / "part.pth")
    assert raised.value.hint == "download it again"


def test_an_archive_named_safetensors_is_refused(honest):
    path = honest.rename(honest.with_suffix(".safetensors"))
    with pytest.raises(UnsafeFileError, match=r"is named \.safetensors, but is a pickle inside"):
        read_foreign(path)


def test_what_is_no_regular_file_is_refused(tmp_path):
    for path, message in ((tmp_path, "not a regular file"), (tmp_path / "none.pth", "No such file")):
        with pytest.raises(ArtifactError, match=message):
            read_foreign(path)
    os.mkfifo(tmp_path / "pipe.pth")
    with pytest.raises(ArtifactError, match="not a regular file"):
        read_foreign(tmp_path / "pipe.pth")


def test_a_tensor_alone_is_not_enough(tmp_path):
    torch.save(torch.ones(3), tmp_path / "alone.pth")
    with pytest.raises(ArtifactError, match="holds a Tensor, but named tensors are needed"):
        read_foreign(tmp_path / "alone.pth")
