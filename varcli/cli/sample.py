"""`varcli sample`: pictures from a trained transformer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Option

from varcli.cli import console
from varcli.cli.options import (
    BatchSizeOption,
    ClassesOption,
    DeviceOption,
    JsonOption,
    ModelOption,
    OutOption,
    PrecisionOption,
    SeedOption,
)

if TYPE_CHECKING:
    from varcli.sampling import Generator

_COMPILE_FROM = 1000  # images a process


def sample(
    class_: ClassesOption = None,
    n: Annotated[
        int | None, Option("--n", "--count", min=1, help="Images of each class; default: 16, or 4 without --class.")
    ] = None,
    classes: Annotated[
        str | None, Option("--classes", help="all, in place of --class: every class.", show_default=False)
    ] = None,
    per_class: Annotated[int | None, Option("--per-class", min=1, help="With --classes all; default: 4.")] = None,
    out: OutOption = Path("samples"),
    model: ModelOption = None,
    cfg: Annotated[
        float | None, Option("--cfg", min=0, help="Guidance in VAR's convention: 0 is none. Default: 1.5.")
    ] = None,
    cfg_schedule: Annotated[
        str | None, Option("--cfg-schedule", help="linear, cosine or constant over the scales. Default: linear.")
    ] = None,
    cfg_interval: Annotated[
        str | None,
        Option(
            "--cfg-interval",
            metavar="FROM,TO",
            help="Shares of the scales, such as 0,0.5, between which guidance is on; it costs nothing after TO. "
            "Default: 0,1.",
        ),
    ] = None,
    top_k: Annotated[
        int | None, Option("--top-k", min=0, help="Draw from the k likeliest codes; 0 draws from all. Default: 900.")
    ] = None,
    top_p: Annotated[
        float | None,
        Option("--top-p", help="Probability that the likeliest codes keep; 1 draws from all. Default: 0.96."),
    ] = None,
    smooth: Annotated[
        bool | None,
        Option(
            "--smooth/--no-smooth",
            help="Blend codes: smoother pictures, not for metrics. Default: as the model suggests.",
        ),
    ] = None,
    npz: Annotated[bool, Option("--npz", help="Also write samples.npz, as evaluation suites read it.")] = False,
    npz_only: Annotated[
        bool,
        Option("--npz-only", help="Write samples.npz and no PNG files; on the way it takes twice its size on disk."),
    ] = False,
    reject: Annotated[
        str | None,
        Option(
            "--reject",
            metavar="K/N",
            help="Draw N candidates for every K images, and keep those that a classifier finds likeliest to be of their "
            "class; results are marked -re. Without ImageNet's classes it takes a pass over the training images first.",
            show_default=False,
        ),
    ] = None,
    seed: SeedOption = 0,
    batch_size: BatchSizeOption = None,
    workers: Annotated[
        int | None,
        Option(
            "--workers",
            min=0,
            max=256,
            help="Processes that write PNG files while the next images are drawn; default: up to 8 beside a GPU.",
            show_default=False,
        ),
    ] = None,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
    fp8: Annotated[
        bool,
        Option(
            "--fp8",
            help="Large products in FP8, with bf16, from H100 or L40S on, and their weights in half the memory; other "
            "pictures, marked -fp8 in results.",
        ),
    ] = False,
    compile_: Annotated[
        str, Option("--compile", help="on, off, or auto: torch.compile on a GPU from 1,000 images on.")
    ] = "auto",
    json: JsonOption = False,
) -> None:
    """Draw images: a folder of PNGs and a grid. Run again, it draws only what is missing.

    A model may suggest settings for pictures to look at, as varcli's own does:
    they are used, and told, where none is given.

    The same seed, class and number give the same picture in batches of any size:
    byte for byte on a CPU in float32 with --no-smooth, else up to what rounding
    changes, which in half precision may be a detail of the picture.

    With several GPUs: torchrun --nproc-per-node 8 -m varcli sample ...; they
    share the images, which are those of one, with as many threads each
    (OMP_NUM_THREADS) and as above. Some versions of torchrun take --n for an
    option of theirs; --count is the same.
    """
    from varcli import config as configs
    from varcli.distributed import join_world
    from varcli.errors import ConfigError, unknown_name
    from varcli.progress import counted, ignore
    from varcli.sampling import Generator, SampleConfig
    from varcli.sampling.models import find_model
    from varcli.sampling.reject import Rejection
    from varcli.sampling.write import sample_to_folder

    with join_world(device) as (world, own_device):  # whatever is wrong, one of the processes says so
        if classes not in (None, "all"):
            raise ConfigError(f"`--classes` takes `all`, but got `{classes}`", "name single classes with --class")
        if classes and class_:
            raise ConfigError("`--class` and `--classes` both say which classes to draw", "give one of them")
        if per_class and n:
            raise ConfigError("`--n` and `--per-class` both say how many images of a class", "give one of them")
        if per_class and not classes:
            raise ConfigError("`--per-class` goes with `--classes all`", "use --n for the images of each --class")
        if compile_ not in ("auto", "on", "off"):
            raise unknown_name("value of --compile", compile_, ["auto", "on", "off"])
        found = find_model(model)
        given = {"cfg": cfg, "cfg_schedule": cfg_schedule, "top_k": top_k, "top_p": top_p, "smooth": smooth}
        given["cfg_interval"] = None if cfg_interval is None else _parse_interval(cfg_interval)
        given = {name: value for name, value in given.items() if value is not None}
        given |= {"top_k": None} if top_k == 0 else {}
        if world.is_first:
            console.note(f"model: {found.description}")
        rejection = None if reject is None else Rejection.parse(reject)
        generator = Generator.load(found.folder, own_device, precision, fp8)
        suggested = {} if given else generator.suggested  # one setting of one's own, and the rest are the usual ones
        if suggested and world.is_first:
            values = ", ".join(f"{name} {value}" for name, value in suggested.items())
            console.note(f"settings that the model suggests for looking at: {values}; any of your own replaces them")
        config = configs.replace(SampleConfig(seed=seed, precision=precision), {**suggested, **given})
        if class_:
            numbers = [generator.classes.resolve(name) for name in class_]
            count, columns = n or 16, None
        else:
            numbers = list(range(len(generator.classes)))
            count = per_class or n or 4
            columns = count if count <= 16 else None
        wanted = [(number, index) for number in dict.fromkeys(numbers) for index in range(count)]
        num_drawn = len(wanted) if rejection is None else len(wanted) * rejection.of // rejection.keep
        if compile_ == "on" or (compile_ == "auto" and _is_worth_compiling(generator, num_drawn, world.size)):
            generator.compile()
            if world.is_first:
                wait = "a minute or so" if generator.device.type == "cuda" else "minutes"
                console.note(f"torch.compile is on: before the first images come it takes {wait}")
        result = sample_to_folder(
            generator,
            wanted,
            out,
            config,
            model=str(found.folder.name),
            batch_size=batch_size,
            columns=columns,
            npz=npz,
            npz_only=npz_only,
            workers=workers,
            rejection=rejection,
            on_step=console.progress("sampling") if world.is_first else ignore,
            world=world,
        )
    if not world.is_first:
        return
    value = {
        "folder": str(result.folder),
        "grid": str(result.grid),
        "images": result.num_images,
        "drawn": result.num_drawn,
    }
    console.report(value, json, f"{counted(result.num_images, 'image')} in {result.folder}; look at {result.grid}")
    if not json:
        console.next_command("eval", result.folder)


def _is_worth_compiling(generator: Generator, count: int, num_processes: int) -> bool:
    return generator.device.type == "cuda" and count >= _COMPILE_FROM * num_processes


def _parse_interval(text: str) -> tuple[float, ...]:
    from varcli.errors import ConfigError

    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"`--cfg-interval` takes two numbers such as 0,0.5, but got `{text}`") from None
