"""Models are found by path and by name, and what is none is said to be what it is."""

from __future__ import annotations

import pytest

from varcli.errors import ArtifactError
from varcli.sampling.models import find_model


def test_a_run_without_weights_is_no_unknown_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "first").mkdir(parents=True)
    with pytest.raises(ArtifactError, match="unknown model `first`"):
        find_model("first")
    (tmp_path / "runs" / "first" / "config.json").write_text("{}")
    with pytest.raises(ArtifactError, match="has no weights yet"):
        find_model("first")
    with pytest.raises(ArtifactError, match=r"there is no folder `.*second`"):
        find_model(tmp_path / "second")
    with pytest.raises(ArtifactError, match=r"`\.` is not a model"):
        find_model("")
    assert find_model("emoji64").folder.name == find_model().folder.name == "emoji64"
