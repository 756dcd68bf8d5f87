"""Where a tokenizer may lie: by the path or name a user gave, or by the fingerprint that a codes cache names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from varcli.artifacts.find import artifact_folder, comes_with_varcli, known_artifacts
from varcli.artifacts.verify import read_manifest
from varcli.errors import ArtifactError
from varcli.tokenizer.store import KIND


def tokenizer_folder(given: Path | str) -> Path:
    """Return the tokenizer folder behind a path, or behind a name in models/, tokenizers/, runs/ or varcli itself.

    A model or run folder stands for the tokenizer inside it. Raises ArtifactError if there is none.
    """
    return artifact_folder(given, KIND)


def find_tokenizer(fingerprint: str) -> Path:
    """Return the tokenizer folder with this fingerprint among those at hand. Raises ArtifactError if there is none."""
    for info, folder in _originals():
        if info.get("fingerprint") == fingerprint:
            return folder
    raise ArtifactError(
        f"the tokenizer {fingerprint[:6]} that wrote the codes is not in models/, tokenizers/, runs/ or varcli itself",
        "name its folder with --tokenizer",
    )


def default_tokenizer(side: int) -> Path:
    """Choose the tokenizer for images whose shorter side is `side` pixels, where none is named.

    The one for the largest pictures not above that side; of equals the user's before varcli's own. If all are for
    larger pictures, the smallest of them. A run's copy of one is not one more. One whose training has not ended is not
    chosen. Raises ArtifactError if there is none.
    """
    found = [
        (int(info["image_size"]), folder) for info, folder in _originals() if info.get("step") == info.get("steps")
    ]
    if not found:
        raise ArtifactError(
            "there is no tokenizer: models/, tokenizers/ and runs/ hold none, and this varcli comes without one",
            "train one with `varcli train-tokenizer`, or import one with `varcli import`",
        )
    sizes = [size for size, _ in found]
    wanted = max((size for size in sizes if size <= side), default=min(sizes))
    return next(folder for size, folder in found if size == wanted)


def _originals() -> list[tuple[dict[str, Any], Path]]:
    """What the manifests of the tokenizers at hand say, and their folders, in the order of `known_artifacts`.

    Of equal ones, such as the copies that runs hold of the tokenizer of their codes, one alone: varcli's own, or the first.
    """
    by_fingerprint: dict[str, tuple[dict[str, Any], Path]] = {}
    for folder in known_artifacts(KIND):
        info = read_manifest(folder, KIND).info
        fingerprint = str(info.get("fingerprint", folder))
        if comes_with_varcli(folder):
            by_fingerprint.pop(fingerprint, None)
        by_fingerprint.setdefault(fingerprint, (info, folder))
    return list(by_fingerprint.values())
