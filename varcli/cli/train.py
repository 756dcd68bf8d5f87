"""`varcli train`: a transformer from a codes cache."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option

from varcli.cli import console
from varcli.cli.live import expect, training_progress
from varcli.cli.options import ConfigFileOption, DeviceOption, JsonOption, ResumeOption, SetOption, collect_settings

if TYPE_CHECKING:
    from PIL.Image import Image

    from varcli.training.plan import TrainPlan
    from varcli.training.transformer_trainer import SampleRequest

_GRID_CLASSES = 10  # shown in the pictures drawn while training, one row each


def train(
    codes: Annotated[Path, Argument(help="Codes cache written by `varcli tokenize`.")] = Path("codes"),
    depth: Annotated[
        int | None,
        Option(
            "--depth",
            help="Blocks; sets width, heads and recipe. 16, 20, 24, 30, 36 are the paper's. Default: 16 or --init-from's.",
        ),
    ] = None,
    name: Annotated[
        str | None,
        Option(
            "--name",
            help="Name of the run below runs/; default: d and the depth, or the name of --init-from and -tuned.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None, Option("--out", "-o", help="Run folder, in place of a name below runs/.", show_default=False)
    ] = None,
    steps: Annotated[int | None, Option("--steps", help="Optimizer steps; default: the recipe's epochs.")] = None,
    epochs: Annotated[float | None, Option("--epochs", help="Passes over the images, in place of --steps.")] = None,
    batch_size: Annotated[int | None, Option("--batch-size", help="Images a step; default: the recipe's.")] = None,
    eval_every: Annotated[
        int | None,
        Option("--eval-every", min=0, help="Steps between evaluations of samples, as varcli eval; default: never."),
    ] = None,
    lr: Annotated[float | None, Option("--lr", help="Peak learning rate; default: the recipe's.")] = None,
    seed: Annotated[int | None, Option("--seed", min=0, help="Seed of everything random; default: 0.")] = None,
    config: ConfigFileOption = None,
    set_: SetOption = None,
    tokenizer: Annotated[
        str | None,
        Option(
            "--tokenizer",
            help="Tokenizer, model or run folder that wrote the codes; default: found by its fingerprint.",
            show_default=False,
        ),
    ] = None,
    init_from: Annotated[
        str | None,
        Option(
            "--init-from",
            help="Run or model to start from, as released or own; its classes may be others.",
            show_default=False,
        ),
    ] = None,
    device: DeviceOption = "auto",
    precision: Annotated[
        str | None,
        Option("--precision", help="fp32, bf16 or fp16; default: bf16 on CUDA, fp32 elsewhere.", show_default=False),
    ] = None,
    fp8: Annotated[
        bool | None,
        Option(
            "--fp8/--no-fp8",
            help="Large products in FP8, with bf16, from H100 or L40S on. Default: no.",
            show_default=False,
        ),
    ] = None,
    parallel: Annotated[
        str | None,
        Option(
            "--parallel",
            help="Of several processes: ddp (copies), fsdp (shards), hsdp (shards within a host); default: by memory.",
            show_default=False,
        ),
    ] = None,
    resume: ResumeOption = "auto",
    json: JsonOption = False,
) -> None:
    """Train a transformer on a codes cache.

    Run again, it goes on from the last checkpoint, with the settings it was
    begun with. The run folder can be sampled from at any time. Ctrl-C saves
    and stops. All settings: TrainConfig in varcli/training/settings.py.
    With several GPUs: torchrun --nproc-per-node 8 -m varcli train codes; a
    batch is shared among them.
    """
    from varcli import config as configs
    from varcli.devices import resolve_device
    from varcli.distributed import join_world
    from varcli.errors import ConfigError
    from varcli.progress import counted, ignore
    from varcli.training import TrainConfig, train_transformer

    if name is not None and out is not None:
        raise ConfigError("`--name` and `--out` both say where the run goes", "give one of them")
    if steps is not None and epochs is not None:
        raise ConfigError("`--steps` and `--epochs` both say how long to train", "give one of them")
    if name is not None and (not name or Path(name).name != name):
        raise ConfigError(f"`--name` is the name of a folder in runs/, but got `{name}`", "use --out for a path")
    options = {
        "depth": depth,
        "steps": steps,
        "epochs": epochs,
        "batch_size": batch_size,
        "eval_every": eval_every,
        "learning_rate": lr,
        "seed": seed,
        "precision": precision,
        "fp8": fp8,
        "parallel": parallel,
    }
    values = collect_settings(config, set_, options)
    settings = configs.from_dict(TrainConfig, values)
    default = f"d{settings.depth}" if init_from is None else f"{_model_name(Path(init_from))}-tuned"
    folder = out or Path("runs") / (name or default)
    view = training_progress("training")
    with join_world(device) as (world, own_device):

        def announce(plan: TrainPlan) -> None:
            console.note(describe_plan(plan, folder))
            expect(view, plan, resolve_device(own_device), world.size)

        result = train_transformer(
            codes,
            folder,
            settings,
            tokenizer=tokenizer,
            init_from=init_from,
            device=own_device,
            resume=resume,
            given=values.keys(),
            on_step=view if world.is_first else ignore,
            on_plan=announce,
            on_samples=draw_grid,
            on_evaluate=_evaluate,
            world=world,
        )
    if not world.is_first:
        return
    value = {
        "folder": str(result.folder),
        "steps": result.step,
        "seconds": round(result.seconds, 1),
        "parameters": result.num_parameters,
        "train": result.values,
        "validation": result.validation,
        "best": result.best,
    }
    text = f"{folder}  {counted(result.step, 'step')} in {console.format_seconds(result.seconds)}"
    if result.best:
        text += f", validation loss {result.best['loss']:.4g} at its best, after step {result.best['step']:,}"
    console.report(value, json, text)
    if not json:
        console.next_command("sample", "--model", folder)


def describe_plan(plan: TrainPlan, folder: Path) -> str:
    """Write what a run will take as a few lines for people."""
    views = f" x {plan.num_views} views" if plan.num_views > 1 else ""
    pieces = f", {plan.micro_batch_size} at a time" if plan.micro_batch_size < plan.batch_size else ""
    if plan.processes > 1:
        pieces += f" in each of {plan.processes:,} processes ({plan.parallel})"
    compiled = (", fp8" if plan.is_fp8 else "") + (", compiled" if plan.is_compiled else "")
    left = plan.steps - plan.start_step
    lines = [
        f"run       {folder}{f', going on from step {plan.start_step:,}' if plan.start_step else ''}",
        f"model     depth {plan.depth}, width {plan.width}: {plan.num_parameters:,} parameters, "
        f"{plan.tokens_per_image:,} tokens an image",
        f"data      {plan.num_images:,} images{views} in {plan.num_classes:,} classes, {plan.num_validation:,} held out",
        f"training  {plan.steps:,} steps of {plan.batch_size:,} images{pieces} = {plan.epochs:.3g} epochs, "
        f"peak lr {plan.learning_rate:.3g}, recipe: {plan.recipe}",
        f"needs     about {_format_bytes(plan.memory_bytes)} on {plan.device} ({plan.precision}{compiled}) and "
        f"{console.format_seconds(plan.seconds)} for {left:,} steps",
    ]
    return "\n".join([*lines, *(f"note      {note}" for note in plan.notes)])


def _model_name(given: Path) -> str:
    """What people call the model behind a path: the folder that holds `transformer/`."""
    return (given.parent if given.name == "transformer" else given).absolute().name


def _evaluate(request: SampleRequest, count: int) -> Mapping[str, float]:
    from varcli.report.online import evaluate_request

    return evaluate_request(request, count)


def _format_bytes(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{max(1, round(count / 2**20))} MiB"


def draw_grid(request: SampleRequest) -> Image:
    """Draw a few images of a few classes, the same ones each time, while training goes on."""
    from varcli.data.samples import make_grid
    from varcli.sampling import Generator

    generator = Generator(request.tokenizer, request.transformer, request.classes)
    columns = 2 if generator.device.type == "cpu" else 4
    count = len(request.classes)
    rows = range(0, count, -(-count // _GRID_CLASSES))
    return make_grid(generator.sample([row for row in rows for _ in range(columns)]), columns=columns)
