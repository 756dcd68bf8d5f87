"""`varcli pull`: a released VAR model by its name."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from varcli.cli import console
from varcli.cli.options import JsonOption


def pull(
    model: Annotated[str, Argument(help="var-d16, var-d20, var-d24 or var-d30 (256 px), or var-d36 (512 px).")],
    out: Annotated[
        Path | None,
        Option("--out", "-o", help="Model folder to write; default: models/ and the model's name.", show_default=False),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Fetch a released VAR model from the Hugging Face Hub and import it.

    Licence, sizes and places are shown before anything is fetched; run again, it goes on where it stopped. HF_ENDPOINT,
    HF_HOME, HF_HUB_OFFLINE and your token count as for other programs.
    """
    from varcli.interop.pull import MODELS, pull_model

    done = pull_model(model, out, on_step=console.progress("pulling"))
    value = {
        "model": done.name,
        "folder": str(done.folder),
        "new": done.is_new,
        "image_size": done.release.side,
        "depth": done.release.depth,
        "licence": done.release.licence,
        "source": done.release.source,
        "sha256": done.sha256,
        "downloads": str(done.downloads),
    }
    if done.is_new:
        text = (
            f"{done.folder}: {done.name}, {done.release.side} px, {done.release.licence} licence, {done.release.source}"
        )
    else:
        text = f"{done.folder} is there and whole: nothing to do"
    console.report(value, json, text)
    if not json:
        name = done.name if done.folder == MODELS / done.name else done.folder
        console.next_command("sample", "--model", name, "--class", 207)
