"""`varcli train-tokenizer`: a multi-scale tokenizer from a folder of images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from varcli.cli import console
from varcli.cli.live import expect, training_progress
from varcli.cli.options import (
    ConfigFileOption,
    DeviceOption,
    JsonOption,
    MaxSkipOption,
    OutOption,
    ResumeOption,
    SetOption,
    WorkersOption,
    collect_settings,
    gather_tokenizer,
)


def train_tokenizer(
    images: Annotated[Path, Argument(help="Folder of images; its val/, if it has one, is held out.")],
    out: OutOption = Path("tokenizers/mine"),
    steps: Annotated[int | None, Option("--steps", help="Optimizer steps; default: 8,500.", show_default=False)] = None,
    batch_size: Annotated[
        int | None,
        Option("--batch-size", help="Images a step; default: 192 below 128 px, 16 at 256 px.", show_default=False),
    ] = None,
    config: ConfigFileOption = None,
    settings: SetOption = None,
    size: Annotated[
        int | None,
        Option("--size", min=1, help="Side in pixels of the images it is for; default: theirs.", show_default=False),
    ] = None,
    lr: Annotated[
        float | None,
        Option("--lr", help="Peak learning rate; default: 5e-4 below 128 px, else 1e-4.", show_default=False),
    ] = None,
    seed: Annotated[int | None, Option("--seed", min=0, help="Seed of everything random; default: 0.")] = None,
    init_from: Annotated[
        str | None,
        Option(
            "--init-from", help="Tokenizer, model or run folder to start from, as released or own.", show_default=False
        ),
    ] = None,
    device: DeviceOption = "auto",
    precision: Annotated[str | None, Option("--precision", help="fp32 or bf16; default: bf16 on CUDA.")] = None,
    workers: WorkersOption = None,
    max_skip: MaxSkipOption = None,
    resume: ResumeOption = "auto",
    json: JsonOption = False,
) -> None:
    """Train the tokenizer that turns images into codes and back.

    With several GPUs: torchrun --nproc-per-node 8 -m varcli train-tokenizer IMAGES; a batch is shared among them.
    """
    from varcli import config as configs
    from varcli.devices import resolve_device
    from varcli.distributed import join_world
    from varcli.errors import VarcliError
    from varcli.progress import ignore
    from varcli.report.curves import draw_curves
    from varcli.training.tokenizer import train_tokenizer as train
    from varcli.training.tokenizer_settings import TokenizerTrainConfig

    with join_world(device) as (world, own_device):
        given = {"steps": steps, "batch_size": batch_size, "learning_rate": lr, "seed": seed, "precision": precision}
        given |= {"workers": workers, "max_skip": max_skip}
        values = gather_tokenizer(collect_settings(config, settings, given))
        architecture = values.pop("tokenizer", {})
        resolved = configs.from_dict(TokenizerTrainConfig, values)
        view = training_progress("training") if world.is_first else ignore
        expect(view, None, resolve_device(own_device))
        result = train(
            images,
            out,
            resolved,
            init_from=init_from,
            architecture=architecture,
            size=size,
            device=own_device,
            resume=resume,
            given=values.keys(),
            on_step=view,
            on_validation=draw_curves,
            world=world,
        )
    if not world.is_first:
        return
    curves = None
    try:
        curves = str(draw_curves(result.folder))
    except VarcliError as error:  # the tokenizer is there all the same
        console.note(f"no curves: {error}")
    report = {"folder": str(result.folder / "tokenizer"), "steps": result.step, "seconds": result.seconds}
    report["curves"] = curves
    numbers = ", ".join(
        f"{name} {result.validation[name]:.3g}"
        for name in ("psnr", "perceptual", "codebook_used")
        if name in result.validation
    )
    console.report(
        {**report, **result.validation}, json, f"tokenizer in {result.folder / 'tokenizer'} {numbers}".strip()
    )
    if curves:
        console.note(f"curves: {curves}")
    console.next_command("tokenize", images, "--tokenizer", result.folder / "tokenizer", "--out", "codes")
