"""Classes to pixels with the settings of the paper's FIDs: the whole, and its parts."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from varcli.bench.config import BenchConfig
from varcli.bench.counting import decoder_flops
from varcli.kernels import resolve_kernels
from varcli.sampling import Generator, SampleConfig
from varcli.sampling.engine import Engine, capture
from varcli.sampling.noise import KeyedNoise
from varcli.sampling.walk import walk_steps
from varcli.scaling.flops import sampling_flops
from varcli.tokenizer import VQVAE
from varcli.transformer import Transformer

TRANSFORMER, DECODER = "sample: transformer", "sample: decoder"
"""What the parts are called; guidance, truncation and draw are the rest."""


def sampling_stage(
    size: int, config: BenchConfig, device: torch.device, dtype: torch.dtype
) -> dict[str, tuple[Callable[[], Callable[[], object]], float]]:
    """Return the whole generation of `size` images and its parts, by name: what makes the work ready, operations of an image.

    On a CUDA GPU each is one CUDA graph, as `varcli sample` runs it.
    """
    with torch.device(device):  # where weights are drawn fastest
        tokenizer = VQVAE(config.tokenizer).eval().requires_grad_(False)
        transformer = Transformer(config.transformer).eval().requires_grad_(False)
    if config.fp8:
        transformer.keep_in_fp8()
    elif dtype != torch.float32:
        transformer.keep_products_in(dtype)
    tokenizer.keep_decoder_in(dtype)
    generator = Generator(tokenizer.to(device), transformer.to(device))
    if config.kernels != ("auto",):
        transformer.kernels = tokenizer.quantizer.kernels = resolve_kernels(config.kernels[0], device)
    if config.compile:
        generator.compile()
    settings = SampleConfig(precision=str(config.precision))
    labels = [number % config.transformer.num_classes for number in range(size)]
    labels_B = torch.tensor(labels, device=device)
    shape = transformer.config
    codes = torch.randint(shape.vocab_size, (size, shape.seq_len), device=device)
    f_hat = tokenizer.quantizer.embed(codes)
    codes_by_step = codes.split(shape.step_lengths, dim=1)

    def given_codes(step: int, wanted_BlV: Tensor, unwanted_BlV: Tensor | None, strength: float) -> Tensor:
        return generator.order.lookup(codes_by_step[step])

    def walk() -> Tensor:
        *_, state = walk_steps(transformer, generator.order, labels_B, given_codes, settings, dtype)
        return state

    decode_flops = decoder_flops(config.tokenizer)
    flops = sampling_flops(shape.depth, shape.width, shape.step_lengths, shape.vocab_size)
    return {
        "sample": (lambda: _whole(generator, settings, labels, device), flops + decode_flops),
        TRANSFORMER: (lambda: _repeatable(walk, device), flops),
        DECODER: (lambda: _repeatable(lambda: generator.decode(f_hat, settings), device), decode_flops),
    }


def _whole(
    generator: Generator, settings: SampleConfig, labels: list[int], device: torch.device
) -> Callable[[], object]:
    if device.type == "cuda":
        engine = Engine(generator, settings, len(labels))
        return lambda: engine.start(settings.seed, labels, range(len(labels)))
    labels_B = torch.tensor(labels, device=device)
    noise = KeyedNoise(settings.seed, labels, range(len(labels)), device)
    return lambda: generator.decode(generator.generate(labels_B, noise, settings), settings)


def _repeatable(run: Callable[[], object], device: torch.device) -> Callable[[], object]:
    if device.type != "cuda":
        return run
    graph, _ = capture(run, device)
    return graph.replay
