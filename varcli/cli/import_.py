"""`varcli import`: released VAR weights into a model folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from varcli.cli import console
from varcli.cli.options import JsonOption, SetOption


def import_(
    files: Annotated[
        list[Path],
        Argument(help="A VQVAE and a VAR transformer (.pth or .safetensors), or one trainer checkpoint holding both."),
    ],
    out: Annotated[Path, Option("--out", "-o", help="Model folder to write, e.g. models/var-d16.")],
    set_: SetOption = None,
    json: JsonOption = False,
) -> None:
    """Turn released VAR weights or a VAR trainer's checkpoint into a model folder.

    Files are read without running what they say; every tensor is accounted for. `--set` gives what tensors cannot show,
    under the released code's names, such as patch_nums, using_znorm or beta.
    """
    from varcli.config import parse_assignments
    from varcli.interop.official import import_official

    options = parse_assignments(set_ or [])
    done = import_official(files, out, options, on_step=console.progress("importing"))
    tokenizer, transformer = done.tokenizer, done.transformer
    value = {
        "folder": str(done.folder),
        "tokenizer": done.fingerprint,
        "image_size": tokenizer.image_size,
        "patch_nums": list(tokenizer.patch_nums),
        "depth": transformer.depth if transformer else None,
        "classes": transformer.num_classes if transformer else None,
        "parameters": done.num_parameters,
    }
    lines = [
        f"{done.folder}",
        f"tokenizer    {done.num_parameters['tokenizer']:,} parameters, {tokenizer.image_size} px, "
        f"{tokenizer.vocab_size} codes, fingerprint {done.fingerprint}",
    ]
    if transformer is not None:
        lines.append(
            f"transformer  {done.num_parameters['transformer']:,} parameters, depth {transformer.depth}, "
            f"{transformer.num_classes} classes, {transformer.seq_len} tokens"
        )
    console.report(value, json, "\n".join(lines))
    if transformer is not None and not json:
        console.next_command("sample", "--model", done.folder, "--class", 0)
    elif not json:
        console.next_command("tokenize", "IMAGES", "--out", "codes", "--tokenizer", done.folder)
