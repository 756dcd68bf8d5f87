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
from varcli.order import ScaleOrder

SAMPLED = [case for case in cases("var", having="sampling.safetensors") if case.tokenizer_case().folder.is_dir()]
Choose = Callable[[int, Tensor], Tensor]


@functools.lru_cache(maxsize=1)
def models_of(case: Case):
    """The transformer, the order over its tokenizer's quantizer, and the tokenizer, or None if only its quantizer is kept."""
    found = case.tokenizer_case()
    transformer = load_transformer(case.weights(), **case.config)
    if found in whole_tokenizers():
        tokenizer = load_tokenizer(found.weights(), **found.config)
        return transformer, ScaleOrder(tokenizer.quantizer), tokenizer
    return transformer, ScaleOrder(load_quantizer(found.weights(), **found.config)), None


@torch.no_grad()
def walk(case: Case, labels_B: Tensor, cfg: float, choose: Choose) -> tuple[Tensor, Tensor, Tensor]:
    """Go through every step with `choose(step, guided logits)`; return codes, guided logits and f_hat."""
    transformer, order, _ = models_of(case)
    batch, last = len(labels_B), len(order.step_lengths) - 1
    cache = transformer.start_cache(torch.cat((labels_B, torch.full_like(labels_B, transformer.config.num_classes))))
    state, x_BlZ = order.start(batch, torch.device("cpu")), None
    codes, logits = [], []
    for step in range(len(order.step_lengths)):
        wanted, unwanted = transformer.step(None if x_BlZ is None else x_BlZ.repeat(2, 1, 1), cache).split(batch)
        t = cfg * step / last
        logits.append((1 + t) * wanted - t * unwanted)
        codes.append(choose(step, logits[-1]))
        state, x_BlZ = order.advance(state, step, order.lookup(codes[-1]))
    return torch.cat(codes, dim=1), torch.cat(logits, dim=1), order.finish(state)


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
    return tensor_BL.split(models_of(case)[1].step_lengths, dim=1)


def assert_picture(case: Case, golden: dict[str, Tensor], name: str, f_hat: Tensor) -> None:
    """Compare the picture where it and the decoder's weights are stored; golden pictures are in [0, 1]."""
    tokenizer = models_of(case)[2]
    if tokenizer is not None and thinned(golden, f"{name}.image"):
        with torch.no_grad():
            assert_stored(golden, f"{name}.image", (tokenizer.decode(f_hat) + 1) / 2, FEATURES)


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
