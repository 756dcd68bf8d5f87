"""`varcli curves`: the curves of a training run as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from varcli.cli import console
from varcli.cli.options import JsonOption


def curves(
    run: Annotated[
        Path, Argument(help="Run of varcli train or varcli train-tokenizer, by its folder or its name in runs/.")
    ],
    out: Annotated[
        Path | None, Option("--out", "-o", help="PNG to write; default: curves.png in the run.", show_default=False)
    ] = None,
    json: JsonOption = False,
) -> None:
    """Draw losses, quality and codebook usage of a run over its steps, from its log, also while it runs."""
    from varcli.data.runs import resolve_run
    from varcli.report.curves import draw_curves

    path = draw_curves(resolve_run(run), out)
    console.report({"curves": str(path)}, json, str(path))
