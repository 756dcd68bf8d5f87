"""`varcli info`: what any path holds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from varcli.cli import console
from varcli.cli.options import JsonOption

if TYPE_CHECKING:
    from varcli.report.describe import Description

_WIDTH = 96  # characters of a value; longer ones end in dots, and --json has them whole


def info(
    path: Annotated[Path, Argument(help="Folder or file: images, codes, model, run, samples, weights of others.")],
    verify: Annotated[
        bool, Option("--verify", help="Also hash every file and compare it with its manifest.", show_default=False)
    ] = False,
    json: JsonOption = False,
) -> None:
    """Say what a folder or file is. Nothing in it is run: a .pth file is looked at, not unpickled."""
    from varcli.report.describe import describe

    found = describe(path, verify)
    if json:
        console.json_result(_as_json(found))
        return
    _show(found, "")
    if verify:
        console.note("every file is as its manifest says")


def _show(found: Description, indent: str) -> None:
    console.result(f"{indent}{found.path}: {found.summary}")
    facts = {name: value for name, value in found.facts.items() if value is not None}
    width = max((len(name) for name in facts), default=0)
    for name, value in facts.items():
        console.result(f"{indent}  {name.replace('_', ' '):{width}}  {_shortened(value)}")
    for part in found.parts:
        _show(part, indent + "  ")


def _shortened(value: Any) -> str:
    text = console.one_line(_text(value))
    return text if len(text) <= _WIDTH else text[: _WIDTH - 3] + "..."


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_text(entry)}" for key, entry in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(str(entry) for entry in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _as_json(found: Description) -> dict[str, Any]:
    value = {"path": str(found.path), "kind": found.kind, "summary": found.summary, **found.facts}
    if found.parts:
        value["parts"] = {part.kind: _as_json(part) for part in found.parts}
    return value
