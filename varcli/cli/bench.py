"""`varcli bench`: the rates of this machine, beside what it can do at all."""

from __future__ import annotations

from typing import Annotated

from typer import Argument, Option

from varcli.cli import console
from varcli.cli.options import DeviceOption, JsonOption, PrecisionOption


def bench(
    stage: Annotated[str, Argument(help="tokenize, train, sample or all.")] = "all",
    depth: Annotated[int, Option("--depth", help="Blocks of the transformer.")] = 16,
    scales: Annotated[
        str, Option("--scales", help="256, 512, 1024, or sides of the token maps such as 1,2,4.")
    ] = "256",
    tokenizer_width: Annotated[int, Option("--tokenizer-width", help="Channels of the tokenizer.")] = 160,
    batch_size: Annotated[
        list[int] | None, Option("--batch-size", help="Images at once; repeat it for several. Default: 64.")
    ] = None,
    compile_: Annotated[bool, Option("--compile", help="Use torch.compile.")] = False,
    repeats: Annotated[int, Option("--repeats", help="Timed runs; the median counts.")] = 5,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
    json: JsonOption = False,
) -> None:
    """Time the stages with random weights, next to a large matrix product on the same device."""
    from varcli.bench.stages import BenchConfig, run_bench

    config = BenchConfig(
        depth=depth,
        scales=scales,
        tokenizer_width=tokenizer_width,
        batch_sizes=tuple(batch_size or [64]),
        precision=precision,
        compile=compile_,
        repeats=repeats,
        device=device,
    )
    result = run_bench(stage, config, on_step=console.progress("measuring"))
    if json:
        console.json_result(result.to_json())
        return
    ceiling = result.ceiling
    console.result(
        f"{ceiling.device}: {ceiling.dtype} matrix product {ceiling.matmul_tflops:.3g} TFLOP/s, "
        f"copy {ceiling.copy_gb_per_second:,.0f} GB/s"
    )
    rows = [
        (
            entry.stage,
            entry.batch_size,
            f"{entry.milliseconds:,.1f}",
            f"{entry.images_per_second:,.1f}",
            f"{entry.share_of_matmul:.0%}",
            "-" if entry.peak_gib is None else f"{entry.peak_gib:.1f}",
        )
        for entry in result.measurements
    ]
    console.table(("stage", "batch", "ms", "images/s", "of matmul", "peak GiB"), rows)
