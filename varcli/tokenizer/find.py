"""Where a tokenizer may lie: by the path or name a user gave, or by the fingerprint that a codes cache names."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from varcli.artifacts.manifest import MANIFEST_NAME
from varcli.artifacts.verify import read_manifest
from varcli.errors import ArtifactError, unknown_name
from varcli.tokenizer.store import KIND

_ROOTS = (Path("models"), Path("tokenizers"), Path("runs"))
_EMBEDDED = Path(__file__).parents[1] / "embedded"


def tokenizer_folder(given: Path | str) -> Path:
    """Return the tokenizer folder behind a path, or behind a name in models/, tokenizers/, runs/ or varcli itself.

    A model or run folder stands for the tokenizer inside it. Raises ArtifactError if there is none.
    """
    for place in (Path(given), *(root / given for root in (*_ROOTS, _EMBEDDED))):
        found = _in_folder(place)
        if found is not None:
            return found
    if Path(given).exists():
        raise ArtifactError(f"`{given}` holds no tokenizer", "pass a tokenizer, model or run folder")
    names = {folder.parent.name if folder.name == KIND else folder.name for folder in known_tokenizers()}
    raise unknown_name("tokenizer", str(given), names, ArtifactError)


def find_tokenizer(fingerprint: str) -> Path:
    """Return the tokenizer folder with this fingerprint among those at hand. Raises ArtifactError if there is none."""
    for folder in known_tokenizers():
        try:
            if read_manifest(folder, KIND).info.get("fingerprint") == fingerprint:
                return folder
        except ArtifactError:
            continue  # somebody else's trouble
    raise ArtifactError(
        f"the tokenizer {fingerprint[:6]} that wrote the codes is not in models/, tokenizers/, runs/ or varcli itself",
        "name its folder with --tokenizer",
    )


def known_tokenizers() -> Iterator[Path]:
    """Yield every tokenizer folder at hand: the user's first, then those that come with varcli."""
    for root in (*_ROOTS, _EMBEDDED):
        for place in sorted(root.iterdir()) if root.is_dir() else ():
            found = _in_folder(place)
            if found is not None:
                yield found


def _in_folder(place: Path) -> Path | None:
    """The tokenizer folder that `place` is or holds."""
    for folder in (place / KIND, place):
        if (folder / MANIFEST_NAME).is_file():
            try:
                read_manifest(folder, KIND)
            except ArtifactError:
                continue
            return folder
    return None


def default_tokenizer(side: int) -> Path:
    """Choose the tokenizer for images whose shorter side is `side` pixels, where none is named.

    The one for the largest pictures not above that side; of equals the user's before varcli's own. If all are for
    larger pictures, the smallest of them. One whose training has not ended is not chosen. Raises ArtifactError if there
    is none.
    """
    infos = [(read_manifest(folder, KIND).info, folder) for folder in known_tokenizers()]
    found = [(int(info["image_size"]), folder) for info, folder in infos if info.get("step") == info.get("steps")]
    if not found:
        raise ArtifactError(
            "there is no tokenizer: models/, tokenizers/ and runs/ hold none, and this varcli comes without one",
            "train one with `varcli train-tokenizer`, or import one with `varcli import`",
        )
    sizes = [size for size, _ in found]
    wanted = max((size for size in sizes if size <= side), default=min(sizes))
    return next(folder for size, folder in found if size == wanted)
