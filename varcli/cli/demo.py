"""`varcli demo`: everything once, on the images that come with varcli."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Option

from varcli.cli import console
from varcli.cli.options import DeviceOption, JsonOption, OutOption, SeedOption

if TYPE_CHECKING:
    from varcli.progress import OnStep
    from varcli.report.demo import DemoResult, Stage


def demo(
    out: OutOption = Path("demo"),
    minutes: Annotated[float, Option("--minutes", help="Minutes of training.")] = 1.5,
    steps: Annotated[
        int | None, Option("--steps", min=1, help="Optimizer steps, in place of --minutes.", show_default=False)
    ] = None,
    per_class: Annotated[int, Option("--per-class", min=1, help="Images each model draws of each class.")] = 32,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    json: JsonOption = False,
) -> None:
    """Tokenize, train, sample and evaluate on emoji64, in a few minutes."""
    from varcli.report.demo import DemoConfig, run_demo

    config = DemoConfig(minutes=minutes, steps=steps, per_class=per_class, device=device, seed=seed)
    result = run_demo(out, config, _announce)
    if json:
        console.json_result(_to_json(result))
    else:
        _show(result)


def _announce(stage: Stage) -> OnStep:
    console.note(f"\n{stage.number}. {stage.title}\n   $ {stage.command}")
    return console.progress("  ")


def _show(result: DemoResult) -> None:
    console.result("")
    rows = [
        (name, *(_number(values.get(name)) for values in result.metrics.values()), better)
        for name, better in result.better.items()
    ]
    console.table(("metric", *result.metrics, "better"), rows)
    training = result.training
    loss = f", validation loss {training.best['loss']:.3f}" if training.best else ""
    console.result(
        f"\ntrained      {training.num_parameters / 1e6:.1f} M parameters, {training.step:,} steps in this demo{loss}\n"
        "emoji64      the model that comes with varcli\n"
        "real images  other real images in the samples' place: what perfect samples would get"
    )
    for warning in result.warnings:
        console.result(f"note: {warning}")
    console.result("\npictures, a row a class:")
    console.result(f"  {result.comparison}   left: trained; middle: emoji64; right: real images")
    for picture in result.pictures.values():
        console.result(f"  {picture}")
    longer = console.command("demo", "--out", f"{result.folder}-longer", "--minutes", 10)
    console.result(
        "\nnext:\n"
        '  varcli sample --model emoji64 --class "Food & Drink" --n 64   more pictures of one class\n'
        f"  {longer:61} the same with more training\n"
        "  varcli tokenize YOUR_IMAGES --out codes                       images of your own, one folder a class"
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


def _to_json(result: DemoResult) -> dict[str, object]:
    return {
        "folder": str(result.folder),
        "steps": result.training.step,
        "parameters": result.training.num_parameters,
        "validation": result.training.best,
        "comparison": str(result.comparison),
        "pictures": {name: str(path) for name, path in result.pictures.items()},
        "metrics": result.metrics,
        "warnings": list(result.warnings),
        "seconds": result.seconds,
    }
