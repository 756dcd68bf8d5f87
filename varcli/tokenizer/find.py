"""Where a tokenizer may lie: by the path or name a user gave, or by the fingerprint that a codes cache names."""

from __future__ import annotations

from pathlib import Path

from varcli.artifacts.find import artifact_folder, known_artifacts
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
    for folder in known_artifacts(KIND):
        try:
            if read_manifest(folder, KIND).info.get("fingerprint") == fingerprint:
                return folder
        except ArtifactError:
            continue  # somebody else's trouble
    raise ArtifactError(
        f"the tokenizer {fingerprint[:6]} that wrote the codes is not in models/, tokenizers/, runs/ or varcli itself",
        "name its folder with --tokenizer",
    )


def default_tokenizer(side: int) -> Path:
    """Choose the tokenizer for images whose shorter side is `side` pixels, where none is named.

    The one for the largest pictures not above that side; of equals the user's before varcli's own. If all are for
    larger pictures, the smallest of them. One whose training has not ended is not chosen. Raises ArtifactError if there
    is none.
    """
    infos = [(read_manifest(folder, KIND).info, folder) for folder in known_artifacts(KIND)]
    found = [(int(info["image_size"]), folder) for info, folder in infos if info.get("step") == info.get("steps")]
    if not found:
        raise ArtifactError(
            "there is no tokenizer: models/, tokenizers/ and runs/ hold none, and this varcli comes without one",
            "train one with `varcli train-tokenizer`, or import one with `varcli import`",
        )
    sizes = [size for size, _ in found]
    wanted = max((size for size in sizes if size <= side), default=min(sizes))
    return next(folder for size, folder in found if size == wanted)
