"""Step-by-step inference computes what the reference computes: guided logits, the codes drawn from them, the pictures."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from golden_files import (
    FEATURES,
    SAFE_MARGIN,
    Case,
    assert_near,
    assert_stored,
    cases,
    thinned,
    whole_tokenizers,
)
from torch import Tensor

from varcli.interop.official import load_quantizer, load_tokenizer, load_transformer
from varcli.sampling import Generator, SampleConfig
from varcli.sampling.logits import draw, guide, truncate
from varcli.sampling.walk import walk_steps
from varcli.tokenizer import TokenizerConfig

SAMPLED = [case for case in cases("var", having="sampling.safetensors") if case.tokenizer_case().folder.is_dir()]
Choose = Callable[[int, Tensor], Tensor]


@functools.lru_cache(maxsize=1)
def models_of(case: Case) -> tuple[Generator, bool]:
    """The generator over a case's models, and whether its decoder is the golden one (else only the quantizer is kept)."""
    found = case.tokenizer_case()
    transformer = load_transformer(case.weights(), **case.config)
    if found in whole_tokenizers():
        return Generator(load_tokenizer(found.weights(), **found.config), transformer), True
    quantizer = load_quantizer(found.weights(), **found.config)
    return Generator(_OnlyQuantizer(quantizer), transformer), False


class _OnlyQuantizer:
    """As much of a tokenizer as the steps need."""

    def __init__(self, quantizer) -> None:
        self.quantizer = quantizer
        self.config = TokenizerConfig(
            patch_nums=tuple(quantizer.scales), vocab_size=quantizer.vocab_size, code_channels=quantizer.code_channels
        )


@torch.no_grad()
def walk(case: Case, labels_B: Tensor, cfg: float, choose: Choose) -> tuple[Tensor, Tensor, Tensor]:
    """Go through every step with `choose(step, guided logits)` -> codes; return codes, guided logits and f_hat."""
    generator, _ = models_of(case)
    codes, logits = [], []

    def look_up(step: int, wanted_BlV: Tensor, unwanted_BlV: Tensor | None, strength: float) -> Tensor:
        logits.append(guide(wanted_BlV, unwanted_BlV, strength))
        codes.append(choose(step, logits[-1]))
        return generator.order.lookup(codes[-1])

    config = SampleConfig(cfg=cfg)
    *_, state = walk_steps(generator.transformer, generator.order, labels_B, look_up, config, torch.float32)
    return torch.cat(codes, dim=1), torch.cat(logits, dim=1), generator.order.finish(state)


def stored(prefix: str) -> pytest.MarkDecorator:
    """Every case and every entry of its sampling file that starts so, such as `greedy_cfg1.5`."""
    found = [
        (case, name.removesuffix(".idx"))
        for case in SAMPLED
        for name in case.tensors("sampling")
        if name.startswith(prefix) and name.endswith(".idx")
    ]
    return pytest.mark.parametrize(("case", "name"), found, ids=[f"{case.name}-{name}" for case, name in found])


def greedily(step: int, logits_BlV: Tensor) -> Tensor:
    return logits_BlV.argmax(dim=-1)


def strength(name: str) -> float:
    return float(name.partition("_cfg")[2].partition("_")[0])


def by_step(case: Case, tensor_BL: Tensor) -> tuple[Tensor, ...]:
    return tensor_BL.split(models_of(case)[0].order.step_lengths, dim=1)


def assert_picture(case: Case, golden: dict[str, Tensor], name: str, f_hat: Tensor) -> None:
    """Compare the picture where it and the decoder's weights are stored; golden pictures are in [0, 1]."""
    generator, has_decoder = models_of(case)
    if has_decoder and thinned(golden, f"{name}.image"):
        with torch.no_grad():
            assert_stored(golden, f"{name}.image", (generator.tokenizer.decode(f_hat) + 1) / 2, FEATURES)


@stored("greedy")
def test_greedy_codes_equal_the_reference(case, name):
    golden = case.tensors("sampling")
    codes, logits, f_hat = walk(case, golden["sample_labels"], strength(name), greedily)
    assert golden[f"{name}.gap"].min() > SAFE_MARGIN  # so no choice was decided by rounding
    assert torch.equal(codes, golden[f"{name}.idx"].long())
    if f"{name}.logits_cfg" in golden:
        assert_near(logits, golden[f"{name}.logits_cfg"], FEATURES)
    assert_picture(case, golden, name, f_hat)


@stored("uncond_greedy")
def test_greedy_codes_without_a_class_equal_the_reference(case, name):
    no_class = torch.tensor([case.config["num_classes"]])
    codes, _, _ = walk(case, no_class, strength(name), greedily)
    assert torch.equal(codes, case.tensors("sampling")[f"{name}.idx"].long())


@stored("forced")
def test_guided_logits_on_given_codes_equal_the_reference(case, name):
    replay(case, name, torch.tensor(case.config["labels"]))


@stored("sampled")
def test_guided_logits_on_codes_drawn_at_random_equal_the_reference(case, name):
    replay(case, name, case.tensors("sampling")["sample_labels"])


def replay(case: Case, name: str, labels_B: Tensor) -> None:
    """Go through the steps with stored codes, and compare logits and picture."""
    golden = case.tensors("sampling")
    given = by_step(case, golden[f"{name}.idx"].long())
    _, logits, f_hat = walk(case, labels_B, strength(name), lambda step, _: given[step])
    if f"{name}.logits_cfg" in golden:
        assert_near(logits, golden[f"{name}.logits_cfg"], FEATURES)
    assert_picture(case, golden, name, f_hat)


class RecordedNoise:
    """The Exp(1) numbers that the reference drew."""

    def __init__(self, case: Case, golden: dict[str, Tensor], name: str) -> None:
        self.streams = [
            by_step(case, golden[f"{name}.{key}"]) for key in ("expo_q", "expo_gumbel") if f"{name}.{key}" in golden
        ]

    def __call__(self, step: int, stream: int, length: int, vocab_size: int) -> Tensor:
        return self.streams[stream][step]


def settings_of(name: str) -> SampleConfig:
    """Read `sampled_cfg2.0_k30_p0.95` and the like."""
    parts = name.split("_")
    top_k = next((int(part[1:]) for part in parts if part[0] == "k"), None)
    top_p = next((float(part[1:]) for part in parts if part[0] == "p" and part != "plain"), None)
    return SampleConfig(cfg=strength(name), top_k=top_k, top_p=top_p, smooth=name.startswith("smooth"))


@stored("sampled")
def test_codes_drawn_with_the_recorded_noise_equal_the_reference(case, name):
    golden, config = case.tensors("sampling"), settings_of(name)
    if f"{name}.expo_q" not in golden:
        pytest.skip("the noise of this case is not kept")
    noise = RecordedNoise(case, golden, name)

    def choose(step: int, logits_BlV: Tensor) -> Tensor:
        return draw(truncate(logits_BlV, config.top_k, config.top_p), noise(step, 0, *logits_BlV.shape[1:]))

    codes, _, _ = walk(case, golden["sample_labels"], config.cfg, choose)
    assert torch.equal(codes, golden[f"{name}.idx"].long())


SMOOTH = [case for case in SAMPLED if any(name.startswith("smooth") for name in case.tensors("sampling"))]


@pytest.mark.parametrize("case", SMOOTH, ids=[case.name for case in SMOOTH])
def test_smooth_pictures_with_the_recorded_noise_equal_the_reference(case):
    golden = case.tensors("sampling")
    name = next(key.rpartition(".")[0] for key in golden if key.startswith("smooth") and key.endswith("expo_gumbel"))
    generator, has_decoder = models_of(case)
    if not has_decoder or not thinned(golden, f"{name}.image"):
        pytest.skip("the decoder or the picture of this case is not kept")
    f_hat = generator.generate(golden["sample_labels"], RecordedNoise(case, golden, name), settings_of(name))
    assert_picture(case, golden, name, f_hat)


KEPT = [
    (case, name)
    for case in SAMPLED
    for name in case.tensors("sampling")
    if name.startswith("forced") and ".kept_" in name
]


@pytest.mark.parametrize(("case", "name"), KEPT, ids=[f"{case.name}-{name}" for case, name in KEPT])
def test_the_codes_that_survive_truncation_equal_the_reference(case, name):
    golden = case.tensors("sampling")
    logits = golden[f"{name.rpartition('.kept_')[0]}.logits_cfg"]
    kept = truncate(logits, top_k=20, top_p=0.9).isfinite()
    assert torch.equal(kept, golden[name].bool())
