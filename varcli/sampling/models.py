"""Which model a name means: a folder, a run, an imported model, or the one that comes with varcli."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from varcli.artifacts.verify import is_artifact
from varcli.data.runs import is_run
from varcli.errors import ArtifactError, unknown_name

_RUNS, _MODELS = Path("runs"), Path("models")
_EMBEDDED = Path(__file__).parents[1] / "embedded"


@dataclass(frozen=True, kw_only=True)
class FoundModel:
    """A folder with `tokenizer/` and `transformer/`, and how to speak of it."""

    folder: Path
    description: str  # e.g. "run runs/d20 (newest in runs/)"


def find_model(name: str | Path | None = None) -> FoundModel:
    """Find a model by path, by name in runs/ or models/ or varcli itself; None takes the newest run, else varcli's own.

    Raises ArtifactError naming what is known if there is none.
    """
    if name is None:
        runs = [folder for folder in _folders(_RUNS) if _is_model(folder)]
        if runs:
            newest = max(runs, key=lambda folder: (folder / "transformer" / "manifest.json").stat().st_mtime)
            return FoundModel(folder=newest, description=f"run {newest}, the newest in runs/")
        for folder in _folders(_EMBEDDED):
            if _is_model(folder):
                return FoundModel(folder=folder, description=f"{folder.name}, which comes with varcli")
        raise ArtifactError(
            "there is no model: runs/ holds no run, and this varcli comes without one",
            "train one with `varcli train`, or name one with --model",
        )
    for folder, kind in (
        (Path(name), "model"),
        (_RUNS / name, "run"),
        (_MODELS / name, "model"),
        (_EMBEDDED / name, "varcli's own"),
    ):
        if _is_model(folder):
            return FoundModel(folder=folder, description=f"{kind} {folder}")
    if Path(name).exists():
        raise ArtifactError(
            f"`{Path(name)}` is not a model: it lacks a finished tokenizer/ or transformer/",
            "pass a run folder, or one written by `varcli import`",
        )
    if is_run(_RUNS / name):
        raise ArtifactError(
            f"run `{_RUNS / name}` has no weights yet", "`varcli train` goes on with it; or name another model"
        )
    known = {folder.name for root in (_RUNS, _MODELS, _EMBEDDED) for folder in _folders(root) if _is_model(folder)}
    if len(Path(name).parts) > 1:
        raise ArtifactError(f"there is no folder `{name}`", f"models known by name: {', '.join(sorted(known))}")
    raise unknown_name("model", str(name), known, ArtifactError)


def _is_model(folder: Path) -> bool:
    return is_artifact(folder / "tokenizer") and is_artifact(folder / "transformer")


def _folders(root: Path) -> list[Path]:
    return sorted(entry for entry in root.iterdir() if entry.is_dir()) if root.is_dir() else []
