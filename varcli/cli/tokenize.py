"""`varcli tokenize`: a codes cache from a folder of images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from varcli.cli import console
from varcli.cli.options import (
    BatchSizeOption,
    DeviceOption,
    JsonOption,
    MaxSkipOption,
    OutOption,
    SeedOption,
    TokenizerOption,
    WorkersOption,
)

_COMPILE = {"auto": None, "on": True, "off": False}
_MANY_IMAGES = 100_000  # from which the published sizes of transformers make sense


def tokenize(
    images: Annotated[Path, Argument(help="Folder of images: class folders, with or without train/ and val/ above.")],
    out: OutOption = Path("codes"),
    tokenizer: TokenizerOption = None,
    views: Annotated[int, Option("--views", min=1, help="Stored views of a training image.")] = 1,
    colour: Annotated[
        float, Option("--colour", min=0, max=1, help="How strongly views after the first change hue and brightness.")
    ] = 0.0,
    max_skip: MaxSkipOption = None,
    follow_links: Annotated[bool, Option("--follow-links", help="Follow links that leave the folder.")] = False,
    seed: SeedOption = 0,
    batch_size: BatchSizeOption = None,
    workers: WorkersOption = None,
    device: DeviceOption = "auto",
    precision: Annotated[
        str, Option("--precision", help="fp32, or bf16 or fp16: faster, and a few codes are others, which is measured.")
    ] = "fp32",
    compile_: Annotated[
        str, Option("--compile", help="on, off, or auto: torch.compile for bf16 and fp16 on CUDA and many images.")
    ] = "auto",
    reduced_decode: Annotated[
        bool, Option("--reduced-decode", help="Decode JPEGs far larger than needed at a fraction of their size.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Turn images into codes, once, so that training need not.

    With several GPUs: torchrun --nproc-per-node 8 -m varcli tokenize ...; they
    share the work, and the codes are those of one.
    """
    from varcli.distributed import join_world
    from varcli.errors import unknown_name
    from varcli.progress import counted, ignore
    from varcli.tokenizer.encode import tokenize as run

    if compile_ not in _COMPILE:
        raise unknown_name("value of --compile", compile_, _COMPILE)
    with join_world(device) as (world, own_device):
        result = run(
            images,
            out,
            tokenizer,
            views=views,
            colour=colour,
            max_skip=max_skip,
            follow_links=follow_links,
            seed=seed,
            batch_size=batch_size,
            workers=workers,
            device=own_device,
            precision=precision,
            compile=_COMPILE[compile_],
            reduced_decode=reduced_decode,
            on_step=console.progress("tokenizing") if world.is_first else ignore,
            world=world,
        )
    if result is None:  # the first process speaks
        return
    value = {
        "folder": str(result.folder),
        "images": result.num_images,
        "rows": result.num_rows,
        "skipped": result.num_skipped,
        "converted": result.converted,
        "classes": len(result.classes),
        "precision": precision,
        "agreement": result.agreement,
    }
    images_of = f"{counted(result.num_images, 'image')} in {counted(len(result.classes), 'class', 'classes')}"
    text = f"{counted(result.num_rows, 'row')} of codes from {images_of}: {out}"
    if result.num_skipped:
        text += f"; skipped {counted(result.num_skipped, 'image')}, see {out}/manifest.json"
    console.report(value, json, text)
    if not json:
        # 16 is the smallest published depth; it is far too large for a small folder
        depth = 16 if result.num_images >= _MANY_IMAGES else 6
        named = ("--tokenizer", tokenizer) if tokenizer is not None and not _is_at_hand(out) else ()
        console.next_command("train", out, "--depth", depth, *named)


def _is_at_hand(codes: Path) -> bool:
    """Say whether `varcli train` finds the tokenizer of a codes cache by itself."""
    from varcli.data.codes import CodesCache
    from varcli.errors import ArtifactError
    from varcli.tokenizer.find import find_tokenizer

    try:
        find_tokenizer(CodesCache.open(codes).tokenizer)
    except ArtifactError:
        return False
    return True
