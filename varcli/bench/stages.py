"""How fast each stage of a VAR runs with random weights: tokenize, train, sample. Rates do not depend on the weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from varcli.bench.calibrate import Ceiling, measure_ceiling, median_seconds
from varcli.devices import autocast, resolve_device, resolve_precision
from varcli.errors import ConfigError, unknown_name
from varcli.order import ScaleOrder
from varcli.progress import OnStep, Step, ignore
from varcli.sampling import Generator, SampleConfig
from varcli.sampling.noise import KeyedNoise
from varcli.scales import PatchNums
from varcli.scaling.flops import sampling_flops, training_flops
from varcli.tokenizer import VQVAE, TokenizerConfig
from varcli.training.objective import Objective
from varcli.training.optim import Updater, build_adamw
from varcli.training.schedules import Schedule
from varcli.transformer import Transformer, TransformerConfig


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """What is run. The defaults are the released model for 256 px at depth 16."""

    depth: int = 16  # of the transformer
    scales: str = "256"  # name of a schedule, or sides joined by commas
    tokenizer_width: int = 160  # channels of the tokenizer at full resolution
    batch_sizes: tuple[int, ...] = (64,)  # images at once, one measurement each
    precision: str = "auto"  # auto, fp32, bf16 or fp16
    compile: bool = False  # torch.compile what runs often
    repeats: int = 5  # timed runs, of which the median counts
    device: str = "auto"  # auto, cpu, cuda or mps

    def __post_init__(self) -> None:
        if self.depth < 1 or self.repeats < 1 or not self.batch_sizes or min(self.batch_sizes) < 1:
            raise ConfigError("depth, repeats and every batch size must be at least 1")

    @property
    def patch_nums(self) -> PatchNums:
        """The schedule of scales."""
        return PatchNums.parse(self.scales)

    @property
    def tokenizer(self) -> TokenizerConfig:
        """A tokenizer of the released architecture."""
        return TokenizerConfig(patch_nums=self.patch_nums.sides, width=self.tokenizer_width)

    @property
    def transformer(self) -> TransformerConfig:
        """A transformer of the paper's architecture."""
        return TransformerConfig.from_depth(self.depth, step_lengths=self.patch_nums.step_lengths)


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One stage at one batch size."""

    stage: str  # tokenize, train, sample
    batch_size: int  # images at once
    milliseconds: float  # median of a whole batch
    images_per_second: float  # batch size over that
    tflops: float  # 1e12 operations of the arithmetic a second
    share_of_matmul: float  # of the rate of a large matrix product on the same device in the same run
    peak_gib: float | None  # GPU memory; None elsewhere


@dataclass(frozen=True, kw_only=True)
class BenchResult:
    """The ceilings of the device, and what was reached."""

    ceiling: Ceiling
    measurements: tuple[Measurement, ...]

    def to_json(self) -> dict:
        """Plain values."""
        return asdict(self)


def run_bench(stage: str, config: BenchConfig | None = None, on_step: OnStep = ignore) -> BenchResult:
    """Measure a stage of STAGES, or "all". Raises ConfigError for another name."""
    config = config or BenchConfig()
    if stage != "all" and stage not in STAGES:
        raise unknown_name("stage", stage, [*STAGES, "all"])
    device = resolve_device(config.device)
    dtype = resolve_precision(config.precision, device)
    ceiling = measure_ceiling(device, dtype)
    names = list(STAGES) if stage == "all" else [stage]
    jobs = [(name, size) for name in names for size in config.batch_sizes]
    found = []
    for done, (name, size) in enumerate(jobs):
        on_step(Step(done, len(jobs), unit="measurements", message=f"{name}, batch {size}"))
        found.append(_measure(name, size, config, device, dtype, ceiling))
    on_step(Step(len(jobs), len(jobs), unit="measurements"))
    return BenchResult(ceiling=ceiling, measurements=tuple(found))


def _measure(
    name: str, size: int, config: BenchConfig, device: torch.device, dtype: torch.dtype, ceiling: Ceiling
) -> Measurement:
    torch.manual_seed(0)
    work, flops = STAGES[name](size, config, device, dtype)
    on_cuda = device.type == "cuda"
    if on_cuda:
        torch.cuda.reset_peak_memory_stats(device)
    seconds = median_seconds(work, device, config.repeats)
    peak = torch.cuda.max_memory_allocated(device) / 2**30 if on_cuda else None
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
    quantizer = VQVAE(TokenizerConfig(patch_nums=config.patch_nums.sides, width=32)).to(device).quantizer
    model = Transformer(config.transformer).to(device).train()
    objective = Objective(model, ScaleOrder(quantizer), device, dtype)
    if config.compile:
        objective.compile()
    updater = Updater(
        build_adamw(model, model.undecayed_parameters()), Schedule(total_steps=1000, learning_rate=1e-4), grad_clip=2.0
    )
    codes = torch.randint(4096, (size, config.patch_nums.seq_len), device=device)
    labels = torch.randint(1000, (size,), device=device)

    def work() -> None:
        updater.begin(0)
        loss, _ = objective.loss(codes, labels)
        updater.backward(loss)
        updater.finish(loss.detach())

    return work, training_flops(config.depth, model.config.width, model.config.step_lengths)


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

    grid = config.patch_nums.grid_side
    decode = _count(config, lambda model, _: model.decode(torch.empty(1, 32, grid, grid, device="meta")))
    return work, decode + sampling_flops(config.depth, transformer.config.width, transformer.config.step_lengths)


def encoding_flops(config: BenchConfig) -> float:
    """Operations of one image to codes: the encoder's as counted, distances to all codes, and phi at every scale."""
    tokenizer, scales = config.tokenizer, config.patch_nums
    distances = 2 * scales.seq_len * tokenizer.vocab_size * tokenizer.code_channels
    phi = 2 * 9 * tokenizer.code_channels**2 * scales.grid_side**2 * scales.num_scales
    return _count(config, lambda model, image: model.features(image)) + distances + phi


def _count(config: BenchConfig, run: Callable[[VQVAE, torch.Tensor], object]) -> float:
    """Count the operations of one image without computing anything."""
    with torch.device("meta"):
        model = VQVAE(config.tokenizer)
        image = torch.empty(1, 3, model.config.image_size, model.config.image_size)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run(model, image)
    return float(counter.get_total_flops())


STAGES: dict[str, Callable[..., Stage]] = {"tokenize": _tokenize, "train": _train, "sample": _sample}
"""Every stage that can be measured, by the name of its command."""
