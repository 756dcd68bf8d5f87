"""Laws of a transformer whose block weights are kept in FP8: rounded once, a byte each, and steps as teacher forcing."""

from __future__ import annotations

import copy

import pytest
import torch

from varcli.errors import ConfigError
from varcli.kernels.fp8 import round_rows
from varcli.transformer import Transformer, TransformerConfig
from varcli.transformer.attention import BlockLinear
from varcli.transformer.store import load_transformer, save_transformer

LABELS = torch.tensor([0, 3])  # 3 stands for no class
INFO = {"tokenizer": "0123456789abcdef", "patch_nums": [1, 2, 4], "order": "scale"}


@pytest.fixture
def features():
    return torch.randn(2, 20, 8, generator=torch.Generator().manual_seed(5))


def lively(config: TransformerConfig, **changes) -> Transformer:
    """A model all of whose weights and biases show in the logits."""
    model = Transformer(TransformerConfig(**{**vars(config), **changes})).eval()
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15, generator=generator)
    return model


def block_layers(model: Transformer) -> dict[str, BlockLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, BlockLinear)}


def distance(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


def test_weights_are_the_rounded_rows_of_the_originals_and_the_rest_is_as_for_bf16(tiny_transformer):
    half, model = copy.deepcopy(tiny_transformer), copy.deepcopy(tiny_transformer)
    half.keep_products_in(torch.bfloat16)
    model.keep_in_fp8()
    originals, layers = block_layers(tiny_transformer), block_layers(model)
    assert len(layers) == 4 * model.config.depth and model.is_kept_in_fp8 and not half.is_kept_in_fp8
    for name, layer in layers.items():
        rows, scales = round_rows(originals[name].weight.detach())
        assert torch.equal(layer.weight.view(torch.uint8), rows.view(torch.uint8))
        assert torch.equal(layer.scales_N1, scales) and not layer.weight.requires_grad
    kept = dict(model.named_parameters())
    for name, parameter in half.named_parameters():
        if name.removesuffix(".weight") not in layers:
            assert kept[name].dtype == parameter.dtype and torch.equal(kept[name], parameter), name
    assert model.num_parameters == tiny_transformer.num_parameters


def test_weights_take_half_of_bf16s_memory(tiny_transformer):
    half, model = copy.deepcopy(tiny_transformer), copy.deepcopy(tiny_transformer)
    half.keep_products_in(torch.bfloat16)
    model.keep_in_fp8()
    before, after = (sum(layer.weight.nbytes for layer in block_layers(kept).values()) for kept in (half, model))
    assert 2 * after == before
    assert all(layer.scales_N1.nbytes == 4 * layer.out_features for layer in block_layers(model).values())


@pytest.mark.parametrize("kernels", ["torch", "triton"])
@pytest.mark.parametrize("changes", [{}, {"shared_adaln": True}, {"qk_norm": False}, {"mlp_ratio": 2.5}])
@torch.no_grad()
def test_cached_steps_match_teacher_forced_logits(tiny_transformer, features, changes, kernels):
    model = lively(tiny_transformer.config, **changes)
    exact = model(LABELS, features)
    model.keep_in_fp8()
    model.kernels = kernels
    cache = model.start_cache(LABELS)
    steps = torch.cat([model.step(x_BlZ, cache) for x_BlZ in (None, features[:, :4], features[:, 4:])], dim=1)
    assert steps.dtype == torch.bfloat16
    whole = model(LABELS, features)
    # where bf16 rounds otherwise, a number may move by a step of FP8: .019 at most, and .026 by the formulas of fused
    # attention, since a CPU computes steps over a cache by torch's own in bf16
    assert distance(steps, whole) < 0.03
    assert 0.005 < distance(whole, exact) < 0.2
    model.kernels = "triton" if kernels == "torch" else "torch"
    assert distance(whole, model(LABELS, features)) < distance(whole, exact)


@torch.no_grad()
def test_only_the_rounding_moves_the_logits(tiny_transformer, features):
    """Law: a model in FP8 is the model with these numbers as its weights, up to the rounding of what they are multiplied by."""
    model = lively(tiny_transformer.config)
    other = copy.deepcopy(model)
    model.keep_in_fp8()
    for name, layer in block_layers(model).items():
        block_layers(other)[name].weight.copy_(layer.weight.float() * layer.scales_N1)
    exact = lively(tiny_transformer.config)(LABELS, features)
    found = model(LABELS, features)
    assert distance(found, other(LABELS, features)) < distance(found, exact)


def test_what_is_rounded_stays_so_and_is_not_saved(tiny_transformer, tmp_path):
    tiny_transformer.keep_in_fp8()
    tiny_transformer.keep_products_in(torch.bfloat16)
    assert tiny_transformer.blocks[0].attention.qkv.weight.dtype == torch.float8_e4m3fn
    with pytest.raises(ConfigError, match="is not saved"):
        save_transformer(tmp_path / "model", tiny_transformer, INFO)
    assert not (tmp_path / "model").exists()


def test_a_device_or_precision_without_fp8_is_refused_before_weights_are_read(tiny_transformer, tmp_path, monkeypatch):
    save_transformer(tmp_path / "model", tiny_transformer, INFO)
    with pytest.raises(ConfigError, match="fp8 needs an NVIDIA GPU"):
        load_transformer(tmp_path / "model", dtype=torch.bfloat16, fp8=True)
    asked = []
    monkeypatch.setattr("varcli.transformer.store.require_fp8", lambda *sizes: asked.append(sizes))
    loaded, _ = load_transformer(tmp_path / "model", dtype=torch.bfloat16, fp8=True)
    assert asked == [(torch.device("cpu"), torch.bfloat16, 64, 256)]
    assert loaded.is_kept_in_fp8 and not any(parameter.requires_grad for parameter in loaded.parameters())


@pytest.mark.gpu
@pytest.mark.parametrize("kernels", ["torch", "triton"])
@torch.no_grad()
def test_on_a_gpu_steps_are_those_on_a_cpu(tiny_transformer, features, kernels):
    model = lively(tiny_transformer.config)
    model.keep_in_fp8()
    model.kernels = kernels
    logits = []
    for device in ("cpu", "cuda"):
        model.to(device)
        cache = model.start_cache(LABELS.to(device))
        parts = (None, features[:, :4].to(device), features[:, 4:].to(device))
        logits.append(torch.cat([model.step(x_BlZ, cache) for x_BlZ in parts], dim=1).cpu())
    assert distance(logits[1], logits[0]) < 0.05
