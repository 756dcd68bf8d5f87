"""A named reference is fetched once and never another. The server is on this machine."""

from __future__ import annotations

import io
from functools import partial

import numpy as np
import pytest
from dropping_server import run_server
from small_sets import draw, write_pngs
from typer.testing import CliRunner

from varcli.artifacts.lock import lock_folder
from varcli.cli.app import app
from varcli.errors import ArtifactError, IntegrityError
from varcli.metrics import named_references
from varcli.metrics.named_references import NAMED, REFERENCES_VARIABLE, named_reference

ARRAYS = {
    "arr_0": np.random.default_rng(0).integers(0, 256, (3, 256, 256, 3), dtype=np.uint8),
    "mu": np.zeros(4),
    "sigma": np.eye(4),
    "mu_s": np.zeros(2),
    "sigma_s": np.eye(2),
}


def as_npz(**changes) -> bytes:
    arrays = {key: array for key, array in {**ARRAYS, **changes}.items() if array is not None}
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


@pytest.fixture
def tiny_named(tmp_path, monkeypatch):
    """A server of this machine with a named reference of small arrays."""
    monkeypatch.setattr(named_references, "NUM_IMAGES", 3)
    monkeypatch.setattr(named_references, "NUM_FEATURES", 4)
    monkeypatch.setattr(named_references, "NUM_SPATIAL", 2)
    monkeypatch.setattr(named_references, "fetch", partial(named_references.fetch, attempts=2, pause=0))
    with run_server(as_npz()) as server:
        monkeypatch.setenv(REFERENCES_VARIABLE, server.address)
        monkeypatch.setenv("VARCLI_CACHE", str(tmp_path / "cache"))
        yield server


def test_a_named_reference_is_fetched_once_and_pinned(tiny_named):
    path = named_reference("imagenet256")
    assert path.read_bytes() == tiny_named.content
    assert named_reference("imagenet256") == path
    assert tiny_named.paths == ["/VIRTUAL_imagenet256_labeled.npz"]


def test_dropped_connections_do_not_change_what_arrives(tiny_named):
    tiny_named.cut = 150_000
    path = named_reference("imagenet256")
    assert path.read_bytes() == tiny_named.content
    assert tiny_named.requests[1:3] == ["bytes=150000-", "bytes=300000-"]
    assert not list(path.parent.glob("*.part*"))


def test_another_file_under_the_name_is_refused(tiny_named):
    path = named_reference("imagenet256")
    path.unlink()
    tiny_named.content = as_npz(mu=np.ones(4))
    with pytest.raises(IntegrityError, match="is expected"):
        named_reference("imagenet256")
    assert not path.exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"<html>please log in</html>", "not a whole npz file"),
        (as_npz()[:-500], "not a whole npz file"),
        (as_npz(mu=np.zeros(5)), r"`mu` is float64 of shape \(5,\)"),
        (as_npz(mu=np.zeros(4, int)), "`mu` is int64"),
        (as_npz(sigma_s=None), "`sigma_s` is missing"),
        (as_npz(arr_0=np.zeros((2, 256, 256, 3), np.uint8)), "`arr_0` is uint8 of shape"),
        (as_npz(arr_0=np.zeros((3, 256, 256, 3), np.float32)), "`arr_0` is float32"),
    ],
)
def test_what_is_not_the_file_is_not_pinned_as_it(tiny_named, content, words):
    tiny_named.content = content
    with pytest.raises(ArtifactError, match=words) as caught:
        named_reference("imagenet256")
    assert "--ref" in caught.value.hint
    tiny_named.content = as_npz()
    assert named_reference("imagenet256").read_bytes() == as_npz()


def test_a_folder_may_hold_it_and_a_missing_one_says_what_to_do(tiny_named, tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    file = tmp_path / "mine" / NAMED["imagenet256"].file
    file.write_bytes(as_npz())
    monkeypatch.setenv(REFERENCES_VARIABLE, str(file.parent))
    assert named_reference("imagenet256") == file
    with pytest.raises(ArtifactError, match="holds no VIRTUAL_imagenet512"):
        named_reference("imagenet512")
    file.write_bytes(as_npz(mu=None))
    with pytest.raises(ArtifactError, match="`mu` is missing"):
        named_reference("imagenet256")
    assert not tiny_named.requests


def test_without_a_network_the_error_says_which_file_goes_where(tiny_named, tmp_path, monkeypatch):
    monkeypatch.setenv(REFERENCES_VARIABLE, "http://127.0.0.1:9/mirror/")
    with pytest.raises(ArtifactError, match="cannot fetch") as caught:
        named_reference("imagenet256")
    place = tmp_path / "cache" / "references" / NAMED["imagenet256"].file
    for words in (f"http://127.0.0.1:9/mirror/{place.name}", str(place), "--ref"):
        assert words in caught.value.hint
    place.write_bytes(as_npz())  # as the hint says
    assert named_reference("imagenet256") == place


def test_two_evaluations_can_begin_at_once(tiny_named):
    path = named_reference("imagenet256")
    with lock_folder(path.parent):
        assert named_reference("imagenet256") == path


def test_eval_says_which_reference_it_chose_and_fetches_none_that_the_features_cannot_use(tiny_named, tmp_path):
    samples = write_pngs(tmp_path / "samples", draw(3, seed=1, side=256))
    done = CliRunner().invoke(app, ["eval", str(samples), "--features", "lite0", "--device", "cpu"])
    assert done.exit_code == 1
    assert "reference: imagenet256" in done.stderr.splitlines()
    assert "statistics of Inception features" in done.stderr and "--inception-weights" in done.stderr
    assert not tiny_named.requests
