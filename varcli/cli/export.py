"""`varcli export`: a model folder under the released VAR code's names."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from varcli.cli import console
from varcli.cli.options import JsonOption


def export(
    model: Annotated[Path, Argument(help="Model or run, by path or name.")],
    out: Annotated[Path, Option("--out", "-o", help="Folder to write.")],
    json: JsonOption = False,
) -> None:
    """Write a model as the released VAR code names its tensors.

    Safetensors only: a .pth file can carry code, so varcli never writes one. The released code reads the result with
    safetensors.torch.load_file and load_state_dict; config.json holds the options of its constructors.
    """
    from varcli.interop.official import export_official
    from varcli.sampling.models import find_model

    done = export_official(model if model.exists() else find_model(str(model)).folder, out)
    value = {"folder": str(done.folder), "files": list(done.files), "notes": list(done.notes)}
    console.report(value, json, "\n".join(str(done.folder / name) for name in done.files))
    for note in done.notes:
        console.note(f"note: {note}")
