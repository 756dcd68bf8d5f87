"""Where the Inception weights are looked for, and which files are taken."""

from __future__ import annotations

import pytest
import torch

from varcli.errors import ArtifactError, UnsafeFileError
from varcli.metrics.inception import WEIGHTS_NAMES, WEIGHTS_VARIABLE, InceptionExtractor, find_inception_weights


@pytest.fixture
def downloads(tmp_path, monkeypatch):
    monkeypatch.delenv(WEIGHTS_VARIABLE, raising=False)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    return tmp_path / "checkpoints"


def test_a_given_path_wins_over_the_variable_and_that_over_downloads(downloads, tmp_path, monkeypatch):
    assert find_inception_weights() is None
    downloaded, named, given = downloads / WEIGHTS_NAMES[1], tmp_path / "named.pth", tmp_path / "given.pth"
    for path in (downloaded, named, given):
        path.write_bytes(b"")
    assert find_inception_weights() == downloaded
    monkeypatch.setenv(WEIGHTS_VARIABLE, str(named))
    assert find_inception_weights() == named
    assert find_inception_weights(given) == given


def test_a_path_that_is_no_file_is_not_passed_over(downloads, tmp_path, monkeypatch):
    (downloads / WEIGHTS_NAMES[0]).write_bytes(b"")
    with pytest.raises(ArtifactError, match="--inception-weights names"):
        find_inception_weights(tmp_path / "none.pth")
    monkeypatch.setenv(WEIGHTS_VARIABLE, str(tmp_path / "none.pth"))
    with pytest.raises(ArtifactError, match=WEIGHTS_VARIABLE):
        find_inception_weights()


def test_weights_of_another_network_are_named(tmp_path):
    torch.save({"fc.weight": torch.zeros(3, 3)}, tmp_path / "weights.pth")
    with pytest.raises(ArtifactError, match="lacks the weight"):
        InceptionExtractor(tmp_path / "weights.pth", torch.device("cpu"), allow_unknown=True)


def test_a_file_that_could_run_code_is_refused(tmp_path):
    torch.save({"fc.weight": torch.nn.Linear(2, 2)}, tmp_path / "weights.pth")
    with pytest.raises(UnsafeFileError):
        InceptionExtractor(tmp_path / "weights.pth", torch.device("cpu"), allow_unknown=True)
