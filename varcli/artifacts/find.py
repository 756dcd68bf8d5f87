"""Where a model's part may lie: by the path or name a user gave, in the folders that varcli writes, or in varcli itself."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from varcli.artifacts.manifest import MANIFEST_NAME
from varcli.artifacts.verify import read_manifest
from varcli.errors import ArtifactError, unknown_name

_ROOTS = (Path("models"), Path("tokenizers"), Path("runs"))
_EMBEDDED = Path(__file__).parents[1] / "embedded"


def artifact_folder(given: Path | str, kind: str) -> Path:
    """Return the folder of `kind` behind a path, or behind a name in models/, tokenizers/, runs/ or varcli itself.

    kind: "tokenizer" or "transformer"; a model or run folder stands for the one inside it. Raises ArtifactError if there
    is none.
    """
    for place in (Path(given), *(root / given for root in (*_ROOTS, _EMBEDDED))):
        found = _in_folder(place, kind)
        if found is not None:
            return found
    if Path(given).exists():
        raise ArtifactError(f"`{given}` holds no {kind}", f"pass a {kind}, model or run folder")
    names = {folder.parent.name if folder.name == kind else folder.name for folder in known_artifacts(kind)}
    raise unknown_name(kind, str(given), names, ArtifactError)


def known_artifacts(kind: str) -> Iterator[Path]:
    """Yield every folder of `kind` at hand: the user's first, then those that come with varcli."""
    for root in (*_ROOTS, _EMBEDDED):
        for place in sorted(root.iterdir()) if root.is_dir() else ():
            found = _in_folder(place, kind)
            if found is not None:
                yield found


def comes_with_varcli(folder: Path) -> bool:
    """Say whether a folder that `known_artifacts` yielded is varcli's own."""
    return _EMBEDDED in folder.parents


def _in_folder(place: Path, kind: str) -> Path | None:
    """The folder of `kind` that `place` is or holds."""
    for folder in (place / kind, place):
        if (folder / MANIFEST_NAME).is_file():
            try:
                read_manifest(folder, kind)
            except ArtifactError:
                continue
            return folder
    return None
