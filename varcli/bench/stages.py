"""How fast each stage of a VAR runs with random weights: tokenize, train, sample, train-tokenizer.

Rates do not depend on the weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import torch

from varcli.bench.calibrate import Ceiling, measure_ceiling, median_seconds
from varcli.bench.config import BenchConfig
from varcli.bench.counting import decoder_flops, distance_flops, encoder_flops, phi_flops
from varcli.bench.profile import KernelTime, profile_kernels
from varcli.bench.tokenizer_training import tokenizer_training_stage
from varcli.devices import autocast, resolve_device, resolve_precision
from varcli.errors import unknown_name
from varcli.kernels import resolve_kernels
from varcli.order import ScaleOrder
from varcli.progress import OnStep, Step, ignore
from varcli.sampling import Generator, SampleConfig
from varcli.sampling.noise import KeyedNoise
from varcli.scaling.flops import sampling_flops, training_flops
from varcli.tokenizer import VQVAE
from varcli.tokenizer.quantizer import MultiScaleQuantizer
from varcli.training.objective import Objective
from varcli.training.optim import Updater, build_adamw
from varcli.training.schedules import Schedule
from varcli.transformer import Transformer, drop_branches


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One stage at one batch size."""

    stage: str  # a name of STAGES
    batch_size: int  # images at once
    milliseconds: float  # median of a whole batch
    images_per_second: float  # batch size over that
    tflops: float  # 1e12 operations of the arithmetic a second
    share_of_matmul: float  # of the rate of a large matrix product on the same device in the same run
    peak_gib: float | None  # GPU memory; None elsewhere
    kernels: str | None = None  # train: torch or triton
    profile: tuple[KernelTime, ...] = ()  # where the time went, if that was asked for


@dataclass(frozen=True, kw_only=True)
class BenchResult:
    """The ceilings of the device, and what was reached."""

    ceiling: Ceiling
    measurements: tuple[Measurement, ...]

    def to_json(self) -> dict:
        """Plain values."""
        return asdict(self)


def run_bench(stage: str, config: BenchConfig | None = None, on_step: OnStep = ignore) -> BenchResult:
    """Measure a stage of STAGES, or those of ALL. Raises ConfigError for another name."""
    config = config or BenchConfig()
    if stage != "all" and stage not in STAGES:
        raise unknown_name("stage", stage, [*STAGES, "all"])
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
    )


Stage = tuple[Callable[[], object], float]  # a whole batch, and the operations of one image


def _tokenize(size: int, config: BenchConfig, device: torch.device, dtype: torch.dtype) -> Stage:
    """Pixels on the device to codes."""
    model = VQVAE(config.tokenizer).to(device).eval().requires_grad_(False)
    images = torch.rand(size, 3, model.config.image_size, model.config.image_size, device=device) * 2 - 1
    encoder = torch.compile(model.features) if config.compile else model.features

    @torch.no_grad()
    def work() -> None:
        with autocast(device, dtype):
            features = encoder(images)
        model.quantizer.encode(features)

    return work, encoding_flops(config)


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


def encoding_flops(config: BenchConfig) -> float:
    """Operations of one image to codes: the encoder's as counted, distances to all codes, and phi at every scale."""
    tokenizer = config.tokenizer
    return encoder_flops(tokenizer) + distance_flops(tokenizer) + phi_flops(tokenizer)


STAGES: dict[str, Callable[..., Stage]] = {
    "tokenize": _tokenize,
    "train": _train,
    "sample": _sample,
    "train-tokenizer": tokenizer_training_stage,
}
"""Every stage that can be measured, by the name of its command."""

ALL = ("tokenize", "train", "sample")
"""The stages of a transformer, which "all" measures: those of one whose tokenizer is there already."""
