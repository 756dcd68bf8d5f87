"""`varcli bench`: the rates of this machine, beside what it can do at all."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from varcli.cli import console
from varcli.cli.options import (
    ConfigFileOption,
    DeviceOption,
    JsonOption,
    SetOption,
    WorkersOption,
    collect_settings,
    gather_tokenizer,
)

if TYPE_CHECKING:
    from varcli.bench.config import BenchConfig
    from varcli.bench.result import Measurement
    from varcli.distributed import World
    from varcli.training.tokenizer_settings import TokenizerTrainConfig

_LONGEST = 25  # kernels of a profile that are shown
_NAME_LENGTH = 90  # of a kernel, whose whole name may take several lines

_PREDICTORS = ("train", "sample", "all")
_MODELS = ("tokenize", "train", "sample", "all", "train-tokenizer", "tokenize-files")
_FROM_FILES = ("tokenize-files", "eval")
_OPTIONS: dict[str, tuple[str | None, tuple[str, ...]]] = {
    "--depth": ("depth", _PREDICTORS),
    "--scales": ("scales", _MODELS),
    "--tokenizer-width": ("tokenizer_width", _MODELS),
    "--batch-size": ("batch_sizes", _MODELS),
    "--compile": ("compile", _MODELS),
    "--kernels": ("kernels", _PREDICTORS),
    "--parallel": ("parallel", ("train",)),
    "--fp8": ("fp8", _PREDICTORS),
    "--profile": ("profile", ("tokenize", "train", "sample", "all", "train-tokenizer")),
    "--repeats": ("repeats", _MODELS),
    "--n": ("num_files", _FROM_FILES),
    "--size": (None, ("eval",)),
    "--workers": ("workers", _FROM_FILES),
    "--config": (None, ("train-tokenizer",)),
    "--set": (None, ("train-tokenizer",)),
    "--precision": ("precision", _MODELS),
}
"""Options that some stages have no use for: the field of BenchConfig, if it is one, and the stages that they belong to."""


def bench(
    stage: Annotated[
        str, Argument(help="tokenize, train, sample, all (these three), train-tokenizer, tokenize-files, or eval.")
    ] = "all",
    depth: Annotated[
        int | None, Option("--depth", min=1, help="train, sample: blocks of the transformer. Default: 16.")
    ] = None,
    scales: Annotated[
        str | None, Option("--scales", help="256, 512, 1024, or sides of the token maps such as 1,2,4. Default: 256.")
    ] = None,
    tokenizer_width: Annotated[
        int | None, Option("--tokenizer-width", min=1, help="Channels of the tokenizer. Default: 160.")
    ] = None,
    batch_size: Annotated[
        list[int] | None, Option("--batch-size", min=1, help="Images at once; repeat it for several. Default: 64.")
    ] = None,
    compile_: Annotated[bool, Option("--compile", help="Use torch.compile.")] = False,
    kernels: Annotated[
        list[str] | None,
        Option("--kernels", help="train, sample: auto, torch or triton; repeat it to compare. Default: auto."),
    ] = None,
    parallel: Annotated[
        list[str] | None,
        Option("--parallel", help="train under torchrun: ddp, fsdp or hsdp; repeat it to compare. Default: ddp."),
    ] = None,
    fp8: Annotated[bool, Option("--fp8", help="train, sample: large products in FP8, from H100 or L40S on.")] = False,
    profile: Annotated[bool, Option("--profile", help="Also show where the time goes, kernel by kernel.")] = False,
    repeats: Annotated[
        int | None, Option("--repeats", min=1, help="Timed runs; the median counts. Default: 5.")
    ] = None,
    count: Annotated[
        int | None,
        Option("--n", min=2, help="Pictures; default: eval 50,000, tokenize-files 16,384.", show_default=False),
    ] = None,
    size: Annotated[int | None, Option("--size", min=32, help="eval: their side in pixels. Default: 256.")] = None,
    workers: WorkersOption = None,
    config: ConfigFileOption = None,
    settings: SetOption = None,
    device: DeviceOption = "auto",
    precision: Annotated[
        str | None,
        Option("--precision", help="auto, fp32, bf16 or fp16. Default: auto, bf16 on CUDA and fp32 elsewhere."),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Time the stages with random weights, next to a large matrix product on the same device.

    `varcli bench train-tokenizer` times a step of that command with all its losses at work; --config and --set name its
    settings as there, but --batch-size, --precision and --compile are those given here. --scales 1,2,3,4,5,6,8
    --tokenizer-width 40 is the small tokenizer for 64 px.

    `torchrun --nproc-per-node N -m varcli bench train` times a step of N processes together, beside each for itself;
    --batch-size counts the images of each.

    `varcli bench tokenize-files` times `varcli tokenize` on made-up JPEG files, then its decoding and its encoder alone;
    `varcli bench eval` times `varcli eval` on made-up pictures, with its parts and its memory.

    --json prints a line for each result, which says on its own what ran where.
    """
    from varcli.bench.config import BenchConfig
    from varcli.bench.files import FILES
    from varcli.bench.stages import STAGES
    from varcli.distributed import join_world
    from varcli.errors import ConfigError, unknown_name

    options = {
        "--depth": depth,
        "--scales": scales,
        "--tokenizer-width": tokenizer_width,
        "--batch-size": batch_size,
        "--compile": compile_,
        "--kernels": kernels,
        "--parallel": parallel,
        "--fp8": fp8,
        "--profile": profile,
        "--repeats": repeats,
        "--n": count,
        "--size": size,
        "--workers": workers,
        "--config": config,
        "--set": settings,
        "--precision": precision,
    }
    given = {name: value for name, value in options.items() if value is not None and value is not False and value != []}
    with join_world(device) as (world, own_device):  # whatever is wrong, one of the processes says so
        known = ["all", "eval", FILES, *STAGES]
        if stage not in known:
            raise unknown_name("stage", stage, known)
        _refuse_strangers(given, stage)
        if world.size > 1 and stage != "train":
            raise ConfigError(f"processes work together at stage train, not at {stage}", "start it without torchrun")
        if stage == "eval":
            _evaluation(count, size, workers, device, json)
            return
        values = collect_settings(config, settings, {})
        fields = {
            _OPTIONS[name][0]: tuple(value) if isinstance(value, list) else value for name, value in given.items()
        }
        resolved = BenchConfig(
            device=own_device, **{field: value for field, value in fields.items() if field is not None}
        )
        if values:
            resolved = replace(resolved, tokenizer_training=_tokenizer_training(gather_tokenizer(values), resolved))
        _measure(stage, resolved, json, world)


def _measure(stage: str, config: BenchConfig, json: bool, world: World) -> None:
    """Run what was asked for; the first process prints what came of it."""
    from varcli.bench.stages import run_bench

    if not world.is_first:
        run_bench(stage, config, world=world)
        return
    progress = console.progress("measuring")
    if json:  # line by line, so that what was measured is there if the rest comes to nothing
        run_bench(stage, config, progress, lambda result: console.json_lines(result.records()), world)
        return
    result = run_bench(stage, config, progress, world=world)
    ceiling = result.ceiling
    console.result(
        f"{ceiling.device}: {ceiling.dtype} matrix product {ceiling.matmul_tflops:.3g} TFLOP/s, "
        f"copy {ceiling.copy_gb_per_second:,.0f} GB/s"
    )
    rows = [
        (
            _label(entry),
            entry.batch_size,
            f"{entry.milliseconds:,.1f}",
            f"{entry.images_per_second:,.1f}",
            f"{entry.share_of_matmul:.0%}",
            "-" if entry.peak_gib is None else f"{entry.peak_gib:.1f}",
        )
        for entry in result.measurements
    ]
    console.table(("stage", "batch", "ms", "images/s", "of matmul", "peak GiB"), rows)
    for entry in result.measurements:
        if entry.processes > 1:
            console.result(_parallel_text(entry))
        if "agreement" in entry.details:
            console.result(_files_text(entry.details))
        if entry.profile:
            _profile(entry)


def _refuse_strangers(given: Iterable[str], stage: str) -> None:
    """Raise ConfigError if an option was given that changes nothing of the stage, and say where it belongs."""
    from varcli.errors import ConfigError

    strangers: dict[tuple[str, ...], list[str]] = {}
    for name in given:
        _, stages = _OPTIONS[name]
        if stage not in stages:
            strangers.setdefault(stages, []).append(f"`{name}`")
    if strangers:
        parts = [
            f"{_listed(names)} {'belongs' if len(names) == 1 else 'belong'} to {_listed(stages)}"
            for stages, names in strangers.items()
        ]
        raise ConfigError(
            f"{'; '.join(parts)}; but the stage is {stage}", "leave out what does not belong to the stage"
        )


def _listed(words: Sequence[str]) -> str:
    return " and ".join([*([", ".join(words[:-1])] if len(words) > 1 else []), words[-1]])


def _label(entry: Measurement) -> str:
    together = f"{entry.parallel} x {entry.processes}" if entry.processes > 1 else None
    compiled = "compiled" if entry.is_compiled else None
    parts = (entry.stage, entry.kernels, entry.precision, "fp8" if entry.is_fp8 else None, compiled, together)
    return ", ".join(part for part in parts if part)


def _parallel_text(entry: Measurement) -> str:
    return (
        f"{_label(entry)}, batch {entry.batch_size}: each at {entry.details['of_alone']:.1%} of its rate for itself; sums over "
        f"the processes go at {entry.details['exchange_gb_per_second']:,.1f} GB/s"
    )


def _profile(entry: Measurement) -> None:
    """Print the kinds of a measurement's kernels, and the kernels that take longest."""
    from varcli.bench.profile import by_kind

    total = sum(kernel.milliseconds for kernel in entry.profile)
    kinds = [
        (kind, f"{milliseconds:,.2f}", f"{milliseconds / total:.1%}", f"{count:,.0f}")
        for kind, (milliseconds, count) in by_kind(entry.profile).items()
    ]
    console.result("")
    console.table(
        ("kind", "ms", "share", "launches"),
        kinds,
        title=f"{_label(entry)}, batch {entry.batch_size}: kernels take {total:,.1f} of {entry.milliseconds:,.1f} ms",
    )
    console.result("")
    longest = [
        (
            kernel.name[:_NAME_LENGTH],
            kernel.kind,
            f"{kernel.milliseconds:,.3f}",
            f"{kernel.share:.1%}",
            f"{kernel.count:,.0f}",
        )
        for kernel in entry.profile[:_LONGEST]
    ]
    console.table(("kernel", "kind", "ms", "share", "launches"), longest)


def _files_text(details: dict[str, Any]) -> str:
    """What a table has no column for."""
    text = f"{details['files']:,} files of {details['file_kb']:.0f} kB in {details['seconds']:,.1f} s"
    text += f", {details['workers']} processes decode"
    if details["steady_images_per_second"]:
        text += f"; {details['steady_images_per_second']:,.0f} images/s after the first batch"
    if details["agreement"]:
        text += f"; {details['agreement']['tokens']:.2%} of tokens are those of fp32"
    return text


def _tokenizer_training(values: dict[str, Any], bench: BenchConfig) -> TokenizerTrainConfig:
    """Settings of a tokenizer's training; what its architecture leaves open is as `bench` has it."""
    from varcli import config as configs
    from varcli.training.tokenizer_settings import TokenizerTrainConfig

    architecture = {**bench.architecture, **values.get("tokenizer", {})}
    return configs.from_dict(TokenizerTrainConfig, {**values, "tokenizer": architecture})


def _evaluation(count: int | None, size: int | None, workers: int | None, device: str, json: bool) -> None:
    from varcli.bench.evaluation import EvalBenchConfig, bench_evaluation

    given = {name: value for name, value in (("count", count), ("side", size)) if value is not None}
    config = EvalBenchConfig(**given, workers=workers, device=device)
    result = bench_evaluation(config, on_step=console.progress("measuring"))
    if json:
        console.json_lines([result.record()])
        return
    ceiling = result.ceiling
    console.result(
        f"{ceiling.device}: {ceiling.dtype} matrix product {ceiling.matmul_tflops:.3g} TFLOP/s, the network reaches "
        f"{result.network_tflops:.3g}; {result.count:,} PNG files of {result.file_kb:.0f} kB, {result.workers} processes decode"
    )
    rows = [
        (
            part.name,
            f"{part.seconds:,.1f}",
            f"{part.images / part.seconds:,.0f}",
            _gib(part.peak_gpu_gib),
            _gib(part.peak_host_gib),
            _gib(part.mapped_gib),
        )
        for part in result.parts
    ]
    console.table(("part", "seconds", "images/s", "GPU GiB", "host GiB", "of it files"), rows)


def _gib(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
