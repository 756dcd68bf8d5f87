"""`varcli data`: the images that come with varcli, and what varcli sees in a folder of one's own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

from varcli.cli import console
from varcli.cli.options import JsonOption

DATASETS = ("emoji64",)
_MAX_ROWS = 20  # classes shown; ImageNet's thousand would hide the rest


def data(
    dataset: Annotated[str, Argument(help="emoji64, to unpack it; or a folder of images, to see what is in it.")],
    out: Annotated[
        Path | None, Option("--out", "-o", help="Where to unpack to; default: data/NAME.", show_default=False)
    ] = None,
    json: JsonOption = False,
) -> None:
    """Unpack the images that come with varcli, or list the classes of a folder of images."""
    from varcli.data.emoji import unpack_emoji64
    from varcli.data.images import open_images
    from varcli.errors import ConfigError, unknown_name

    if dataset in DATASETS:
        unpacked = unpack_emoji64(out or Path("data") / dataset)
        tree = open_images(unpacked.folder)
        state = f"unpacked to {unpacked.folder}" if unpacked.num_written else f"is whole in {unpacked.folder}"
        _show(tree, json, f"{dataset} {state}: drawings by three artists, licences in NOTICE.md")
        console.next_command("tokenize", unpacked.folder, "--out", "codes")
        return
    folder = Path(dataset)
    if not folder.exists() and len(folder.parts) == 1:
        raise unknown_name("dataset or folder", dataset, DATASETS, ConfigError)
    if out is not None:
        raise ConfigError("`--out` is for unpacking a dataset, but a folder was given", f"known: {', '.join(DATASETS)}")
    tree = open_images(folder, allow_single_class=True)
    _show(tree, json, f"{folder}: {tree.summary}")
    if len(tree.classes) < 2:
        console.note("one class only: training needs at least two")


def _show(tree: Any, as_json: bool, headline: str) -> None:
    counts = tree.class_counts()
    if as_json:
        skipped = [{"path": path, "reason": reason} for path, reason in tree.skipped]
        value = {"folder": str(tree.root), "images": tree.num_images, "classes": counts, "skipped": skipped}
        console.json_result({**value, "ignored_files": tree.num_ignored})
        return
    console.result(headline)
    splits = list(tree.splits)
    rows = [(name, index, *(counts[name][split] for split in splits)) for index, name in enumerate(tree.classes)]
    total = (f"{len(rows)} class{'es' if len(rows) != 1 else ''}", "", *(len(tree.splits[split]) for split in splits))
    console.table(("class", "number", *splits), [*rows[:_MAX_ROWS], total])
    if len(rows) > _MAX_ROWS:
        console.note(f"{len(rows) - _MAX_ROWS} more classes are not shown; --json lists all")
    for path, reason in tree.skipped[:5]:
        console.note(f"skipped {console.one_line(path)}: {reason}")
    if len(tree.skipped) > 5:
        console.note(f"skipped {len(tree.skipped) - 5} more; --json lists all")
