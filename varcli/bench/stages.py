"""How fast each stage of a VAR runs with random weights: tokenize, train, sample, train-tokenizer, tokenize-files.

Rates do not depend on the weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from varcli.bench.calibrate import Ceiling, measure_ceiling, median_seconds
from varcli.bench.config import BenchConfig
from varcli.bench.counting import decoder_flops, encoding_flops
from varcli.bench.files import FILES, measure_files
from varcli.bench.profile import profile_kernels
from varcli.bench.result import BenchResult, Measurement
from varcli.bench.tokenizer_training import tokenizer_training_stage
from varcli.devices import precision_name, resolve_device, resolve_precision
from varcli.errors import unknown_name
from varcli.kernels import resolve_kernels
from varcli.order import ScaleOrder
from varcli.progress import OnStep, Step, ignore
from varcli.sampling import Generator, SampleConfig
from varcli.sampling.noise import KeyedNoise
from varcli.scaling.flops import sampling_flops, training_flops
from varcli.tokenizer import VQVAE
from varcli.tokenizer.batch_encoder import BatchEncoder
from varcli.tokenizer.quantizer import MultiScaleQuantizer
from varcli.training.objective import Objective
from varcli.training.optim import Updater, build_adamw
from varcli.training.schedules import Schedule
from varcli.transformer import Transformer, drop_branches


def run_bench(stage: str, config: BenchConfig | None = None, on_step: OnStep = ignore) -> BenchResult:
    """Measure a stage of STAGES, or those of ALL. Raises ConfigError for another name."""
    config = config or BenchConfig()
    if stage not in ("all", FILES, *STAGES):
        raise unknown_name("stage", stage, [*STAGES, FILES, "all"])
    device = resolve_device(config.device)
    dtype = resolve_precision(config.precision, device)
    choices = [resolve_kernels(kernels, device) for kernels in config.kernels]
    ceiling = measure_ceiling(device, dtype)
    names = list(ALL) if stage == "all" else [stage]
    jobs = [
        (name, size, kernels)
        for name in names
        for size in config.batch_sizes
        for kernels in (choices if name == "train" else [None])
    ]
    found = []
    for done, (name, size, kernels) in enumerate(jobs):
        message = f"{name}, batch {size}" + (f", {kernels} kernels" if kernels else "")
        on_step(Step(done, len(jobs), unit="measurements", message=message))
        chosen = replace(config, kernels=(kernels,)) if kernels else config
        if name == FILES:
            found += measure_files(size, chosen, device, dtype, ceiling, on_step)
        else:
            measurement = _measure(name, size, chosen, device, dtype, ceiling)
            found.append(replace(measurement, kernels=kernels))
    on_step(Step(len(jobs), len(jobs), unit="measurements"))
    return BenchResult(ceiling=ceiling, measurements=tuple(found))


def _measure(
    name: str, size: int, config: BenchConfig, device: torch.device, dtype: torch.dtype, ceiling: Ceiling
) -> Measurement:
    torch.manual_seed(0)
    if config.compile:
        torch.compiler.reset()  # else the second batch size is compiled for all sizes, which is slower
    work, flops = STAGES[name](size, config, device, dtype)
    on_cuda = device.type == "cuda"
    if on_cuda:
        torch.cuda.reset_peak_memory_stats(device)
    seconds = median_seconds(work, device, config.repeats)
    peak = torch.cuda.max_memory_allocated(device) / 2**30 if on_cuda else None
    profile = profile_kernels(work, device) if config.profile else ()
    del work
    if on_cuda:
        torch.cuda.empty_cache()
    tflops = flops * size / seconds / 1e12
    return Measurement(
        stage=name,
        batch_size=size,
        milliseconds=seconds * 1e3,
        images_per_second=size / seconds,
        tflops=tflops,
        share_of_matmul=tflops / ceiling.matmul_tflops,
        peak_gib=peak,
        profile=profile,
        precision=precision_name(dtype),
        is_compiled=config.compile and (name, dtype) != ("tokenize", torch.float32),  # which is never compiled there
        model=config.describe(name),
        details={"repeats": config.repeats},
    )


Stage = tuple[Callable[[], object], float]  # a whole batch, and the operations of one image


def _tokenize(size: int, config: BenchConfig, device: torch.device, dtype: torch.dtype) -> Stage:
    """Pixels on the device to codes."""
    model = VQVAE(config.tokenizer).to(device).eval().requires_grad_(False)
    side = model.config.image_size
    images = torch.randint(0, 256, (size, 3, side, side), dtype=torch.uint8, device=device)
    encoder = BatchEncoder(model, dtype, size, config.compile)
    return lambda: encoder.encode(images), encoding_flops(config.tokenizer)


def _train(size: int, config: BenchConfig, device: torch.device, dtype: torch.dtype) -> Stage:
    """One optimizer step on codes that lie on the device."""
    quantizer = MultiScaleQuantizer(config.tokenizer).to(device)
    model = Transformer(config.transformer).to(device).train()
    model.kernels = resolve_kernels(config.kernels[0], device)
    objective = Objective(model, ScaleOrder(quantizer), device, dtype)
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
    return work, training_flops(shape.depth, shape.width, shape.step_lengths, shape.vocab_size)


def _sample(size: int, config: BenchConfig, device: torch.device, dtype: torch.dtype) -> Stage:
    """Classes to pixels on the device, with the settings of the paper's FIDs."""
    tokenizer = VQVAE(config.tokenizer).to(device).eval().requires_grad_(False)
    transformer = Transformer(config.transformer).to(device).eval().requires_grad_(False)
    generator = Generator(tokenizer, transformer)
    settings = SampleConfig(precision=str(config.precision))
    labels = torch.randint(1000, (size,), device=device)
    noise = KeyedNoise(0, labels.tolist(), range(size), device)

    def work() -> None:
        generator.decode(generator.generate(labels, noise, settings), settings)

    shape = transformer.config
    flops = sampling_flops(shape.depth, shape.width, shape.step_lengths, shape.vocab_size)
    return work, decoder_flops(config.tokenizer) + flops


STAGES: dict[str, Callable[..., Stage]] = {
    "tokenize": _tokenize,
    "train": _train,
    "sample": _sample,
    "train-tokenizer": tokenizer_training_stage,
}
"""Every stage that is one piece of work on the device, by the name of its command; `FILES` is a stage of several parts."""

ALL = ("tokenize", "train", "sample")
"""The stages of a transformer, which "all" measures: those of one whose tokenizer is there already."""
