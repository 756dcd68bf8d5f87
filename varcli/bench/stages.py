"""How fast each stage of a VAR runs with random weights: tokenize, train, sample, train-tokenizer, tokenize-files.

Rates do not depend on the weights.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from varcli.bench.calibrate import Ceiling, measure_ceiling, measure_exchange, median_seconds, slowest
from varcli.bench.config import BenchConfig
from varcli.bench.counting import encoding_flops
from varcli.bench.files import FILES, measure_files
from varcli.bench.profile import profile_kernels
from varcli.bench.result import BenchResult, Measurement
from varcli.bench.sampling import TRANSFORMER, sampling_stage
from varcli.bench.tokenizer_training import tokenizer_training_stage
from varcli.devices import precision_name, resolve_device, resolve_precision
from varcli.distributed import ALONE, World
from varcli.distributed.parallelize import parallelize, require_mode
from varcli.errors import ConfigError, MemoryLimitError, is_out_of_memory, unknown_name
from varcli.kernels import resolve_kernels
from varcli.kernels.fp8 import require_fp8
from varcli.order import ScaleOrder
from varcli.progress import OnStep, Step, ignore
from varcli.scaling.flops import training_flops
from varcli.tokenizer import VQVAE
from varcli.tokenizer.batch_encoder import BatchEncoder
from varcli.tokenizer.quantizer import MultiScaleQuantizer
from varcli.training.objective import Objective
from varcli.training.optim import Updater, build_adamw
from varcli.training.schedules import Schedule
from varcli.transformer import Transformer, drop_branches

_IN_FP8 = {"train", "sample", TRANSFORMER}  # what --fp8 changes
_IN_A_ROW = 4  # training steps that are timed together, as a trainer does not wait for the device between them


def run_bench(
    stage: str,
    config: BenchConfig | None = None,
    on_step: OnStep = ignore,
    on_result: Callable[[BenchResult], None] = lambda result: None,
    world: World = ALONE,
) -> BenchResult:
    """Measure a stage of STAGES, or those of ALL. Raises ConfigError for another name.

    on_result: told what each job came to as soon as it is done. A job for which there is too little memory is told to
    `on_step` and left out; MemoryLimitError if that is every one. world: processes that train together, each of which must
    call this alike with stage train; first each trains a model for itself, which the rest is compared with. Too little
    memory then ends all.
    """
    config = config or BenchConfig()
    if stage not in ("all", FILES, *STAGES):
        raise unknown_name("stage", stage, [*STAGES, FILES, "all"])
    device = resolve_device(config.device)
    dtype = resolve_precision(config.precision, device)
    names = list(ALL) if stage == "all" else [stage]
    is_fp8 = config.fp8 and not _IN_FP8.isdisjoint(names)
    if is_fp8:
        require_fp8(device, dtype, config.transformer.width, config.transformer.hidden_width)
    jobs = _jobs(names, config, device, world)
    ceiling = measure_ceiling(device, dtype)
    exchange_rate = measure_exchange(world, device) if world.size > 1 else 0.0
    found: list[Measurement] = []
    for done, job in enumerate(jobs):
        on_step(Step(done, len(jobs), unit="measurements", message=job.name))
        measurements: list[Measurement] | None = None
        try:
            if job.stage == FILES:
                measurements = measure_files(job.size, job.config, device, dtype, ceiling, on_step)
            else:
                measurements = [
                    replace(entry, kernels=job.kernels, parallel=job.parallel, is_fp8=is_fp8 and entry.stage in _IN_FP8)
                    for entry in _measure(job, device, dtype, ceiling, world)
                ]
                if job.parallel:
                    measurements = [_beside_alone(entry, found, exchange_rate) for entry in measurements]
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if world.size > 1:  # the others wait for this one
                raise MemoryLimitError(f"{job.name}: too little memory", "use a smaller --batch-size") from None
            on_step(Step(done, len(jobs), unit="measurements", message=f"{job.name}: too little memory"))
        gc.collect()  # compiled parts and the model they are parts of hold each other
        if device.type == "cuda":
            torch.cuda.empty_cache()
        if measurements is not None:
            on_result(BenchResult(ceiling=ceiling, measurements=tuple(measurements)))
            found += measurements
    on_step(Step(len(jobs), len(jobs), unit="measurements"))
    if not found:
        raise MemoryLimitError("there is too little memory for any of the measurements", "use a smaller --batch-size")
    return BenchResult(ceiling=ceiling, measurements=tuple(found))


class _Job(NamedTuple):
    """What is measured at once: a stage at one batch size in one way."""

    stage: str
    size: int
    config: BenchConfig  # with the kernels below alone
    kernels: str | None = None  # None: what the stage takes by itself
    parallel: str | None = None  # None: each process for itself

    @property
    def name(self) -> str:
        """The same for people."""
        return ", ".join(filter(None, (f"{self.stage}, batch {self.size}", self.kernels, self.parallel)))


def _jobs(names: Sequence[str], config: BenchConfig, device: torch.device, world: World) -> list[_Job]:
    """Return all that is to be measured. Raises ConfigError for ways that cannot be."""
    choices = [(given, resolve_kernels(given, device)) for given in config.kernels]
    if config.parallel and world.size == 1:
        raise ConfigError("parallel is a way of several processes, but there is one", "start it with torchrun")
    modes = tuple(dict.fromkeys(config.parallel)) or ("ddp",)
    for mode in modes:
        require_mode(mode, world)
    shared: tuple[str | None, ...] = (None, *modes) if world.size > 1 else (None,)
    ways: dict[str, list[tuple[str | None, str | None]]] = {
        "train": list(dict.fromkeys((kernels, parallel) for _, kernels in choices for parallel in shared)),
        # what a generator takes by itself depends on its precision
        "sample": [(None if given == "auto" else kernels, None) for given, kernels in choices],
    }
    return [
        _Job(name, size, replace(config, kernels=(kernels or "auto",)), kernels, parallel)
        for name in names
        for size in config.batch_sizes
        for kernels, parallel in ways.get(name, [(None, None)])
    ]


def _beside_alone(entry: Measurement, found: list[Measurement], exchange_rate: float) -> Measurement:
    """Add to a measurement of several processes what became of the rate that each has for itself."""
    alone = next(
        other
        for other in reversed(found)
        if (other.processes, other.batch_size, other.kernels) == (1, entry.batch_size, entry.kernels)
    )
    share = entry.images_per_second / entry.processes / alone.images_per_second
    return replace(entry, details={**entry.details, "of_alone": share, "exchange_gb_per_second": exchange_rate})


def _measure(job: _Job, device: torch.device, dtype: torch.dtype, ceiling: Ceiling, world: World) -> list[Measurement]:
    name, size, config = job.stage, job.size, job.config
    torch.manual_seed(0)
    if config.compile:
        torch.compiler.reset()  # else the second batch size is compiled for all sizes, which is slower
    given = size, config, device, dtype
    stage = _train(*given, world, job.parallel) if job.parallel else STAGES[name](*given)
    in_a_row = _IN_A_ROW if name == "train" and device.type == "cuda" else 1
    return [
        Measurement(
            **_time_part(prepare, flops, job, device, ceiling, in_a_row, world),
            stage=part,
            precision=precision_name(dtype),
            is_compiled=config.compile
            and (name, dtype) != ("tokenize", torch.float32),  # which is never compiled there
            model=config.describe(name),
        )
        for part, (prepare, flops) in stage.items()
    ]


def _time_part(
    prepare: Callable[[], Callable[[], object]],
    flops: float,
    job: _Job,
    device: torch.device,
    ceiling: Ceiling,
    in_a_row: int,
    world: World,
) -> dict[str, Any]:
    """Return the fields of a Measurement that are measured; of several processes the slowest one's time counts."""
    config, on_cuda = job.config, device.type == "cuda"
    if on_cuda:
        torch.cuda.reset_peak_memory_stats(device)
    work = prepare()
    world.wait()
    seconds = slowest(median_seconds(work, device, config.repeats, in_a_row=in_a_row), world)
    peak = torch.cuda.max_memory_allocated(device) / 2**30 if on_cuda else None
    profile = profile_kernels(work, device) if config.profile else ()
    del work
    if on_cuda:
        torch.cuda.empty_cache()
    tflops, processes = flops * job.size / seconds / 1e12, world.size if job.parallel else 1
    return {
        "batch_size": job.size,
        "milliseconds": seconds * 1e3,
        "images_per_second": processes * job.size / seconds,
        "processes": processes,
        "tflops": tflops,
        "share_of_matmul": tflops / ceiling.matmul_tflops,
        "peak_gib": peak,
        "profile": profile,
        "details": {"repeats": config.repeats, "in_a_row": in_a_row},
    }


Stage = dict[str, tuple[Callable[[], Callable[[], object]], float]]
"""The whole and its parts by name: what makes a batch of work ready and returns it, and the operations of one image."""


def _tokenize(size: int, config: BenchConfig, device: torch.device, dtype: torch.dtype) -> Stage:
    """Pixels on the device to codes."""
    model = VQVAE(config.tokenizer).to(device).eval().requires_grad_(False)
    side = model.config.image_size
    images = torch.randint(0, 256, (size, 3, side, side), dtype=torch.uint8, device=device)
    encoder = BatchEncoder(model, dtype, size, config.compile)
    return {"tokenize": (lambda: lambda: encoder.encode(images), encoding_flops(config.tokenizer))}


def _train(
    size: int,
    config: BenchConfig,
    device: torch.device,
    dtype: torch.dtype,
    world: World = ALONE,
    mode: str = "ddp",
) -> Stage:
    """One optimizer step on codes that lie on the device, `size` of them in each process."""
    quantizer = MultiScaleQuantizer(config.tokenizer).to(device)
    with torch.device(device):  # where weights are drawn fastest
        model = Transformer(config.transformer).train()
    model.to(device)
    model.kernels = resolve_kernels(config.kernels[0], device)
    if config.fp8:
        model.train_in_fp8()
    parallel = parallelize(model, model.blocks, world, mode, device, dtype)
    objective = Objective(model, ScaleOrder(quantizer), device, dtype, parallel=parallel)
    if config.compile:
        objective.compile()
    updater = Updater(
        build_adamw(model, model.undecayed_parameters()), Schedule(total_steps=1000, learning_rate=1e-4), grad_clip=2.0
    )
    codes = torch.randint(model.config.vocab_size, (size, config.patch_nums.seq_len), device=device)
    labels = torch.randint(1000, (size,), device=device)

    def work() -> None:
        updater.begin(0)
        loss, _ = objective.loss(codes, labels, drop_branches(model.config, size, None, device))
        updater.backward(loss)
        updater.finish(loss.detach())

    shape = model.config
    return {"train": (lambda: work, training_flops(shape.depth, shape.width, shape.step_lengths, shape.vocab_size))}


def _train_tokenizer(size: int, config: BenchConfig, device: torch.device, dtype: torch.dtype) -> Stage:
    """One step of tokenizer training with all its losses at work."""
    work, flops = tokenizer_training_stage(size, config, device, dtype)
    return {"train-tokenizer": (lambda: work, flops)}


STAGES: dict[str, Callable[..., Stage]] = {
    "tokenize": _tokenize,
    "train": _train,
    "sample": sampling_stage,
    "train-tokenizer": _train_tokenizer,
}
"""Every stage that is work on the device alone, by the name of its command; `FILES` is one of files to files."""

ALL = ("tokenize", "train", "sample")
"""The stages of a transformer, which "all" measures: those of one whose tokenizer is there already."""
