"""Products of few rows whose weights are under way early: what comes out, and that nothing is read before it is there."""

from __future__ import annotations

import copy
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

from varcli.kernels import _driver_version, launches_early
from varcli.transformer import Transformer, TransformerConfig
from varcli.transformer.attention import BlockLinear

CONFIG = TransformerConfig(
    depth=6, width=256, num_heads=4, num_classes=10, vocab_size=64, code_channels=8, step_lengths=(1, 4, 9)
)


def prefetching(model: Transformer) -> set[bool]:
    return {layer.prefetches for layer in model.modules() if isinstance(layer, BlockLinear)}


def test_weights_are_prefetched_on_a_gpu_that_can_in_half_precision_and_not_in_a_copy(monkeypatch):
    model = Transformer(CONFIG)
    model.kernels = "triton"
    model.keep_products_in(torch.bfloat16)
    model.prefetch_weights()
    assert prefetching(model) == {False}  # on a CPU
    monkeypatch.setattr("varcli.transformer.model.launches_early", lambda device: True)
    model.prefetch_weights()
    assert prefetching(model) == {True}
    assert prefetching(copy.deepcopy(model)) == {False}
    model.kernels = "torch"
    model.prefetch_weights()
    assert prefetching(model) == {False}
    model.kernels = "triton"
    model.prefetch_weights()
    model.keep_in_fp8()
    assert prefetching(model) == {False}
    model = Transformer(CONFIG)
    model.kernels = "triton"
    model.prefetch_weights()
    assert prefetching(model) == {False}  # in float32


@pytest.mark.parametrize(
    "capability, version, hip, expected",
    [
        ((9, 0), 12_030, None, True),
        ((12, 0), 13_000, None, True),
        ((8, 9), 13_000, None, False),
        ((9, 0), 12_020, None, False),
        ((9, 4), 13_000, "6.2", False),
    ],
)
def test_kernels_are_launched_early_where_gpu_and_driver_can(capability, version, hip, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr("varcli.kernels._driver_version", lambda: version)
    monkeypatch.setattr(torch.version, "hip", hip)
    assert launches_early(torch.device("cuda")) is expected
    assert not launches_early(torch.device("cpu"))


def test_a_driver_that_is_not_there_has_no_version(monkeypatch):
    monkeypatch.setattr("ctypes.CDLL", Mock(side_effect=OSError("libcuda.so.1: cannot open shared object file")))
    assert _driver_version() == 0


@pytest.mark.gpu
def test_a_driver_on_a_gpu_has_the_version_that_torch_needs():
    assert _driver_version() >= 1000 * int(torch.version.cuda.split(".")[0])


@pytest.mark.gpu
@torch.no_grad()
def test_steps_are_those_of_libraries_and_a_graph_of_them_gives_the_same_bytes_each_time():
    torch.manual_seed(0)
    model = Transformer(CONFIG).cuda()
    for parameter in model.parameters():  # gates begin at nothing
        parameter.add_(0.05 * torch.randn_like(parameter))
    model.kernels = "triton"
    model.keep_products_in(torch.bfloat16)
    labels = torch.tensor([3, 10], device="cuda")
    parts = [None, *(torch.randn(2, side**2, 8, device="cuda") for side in (2, 3))]  # 2, 8 and 18 rows

    def run() -> Tensor:
        cache = model.start_cache(labels)
        return torch.cat([model.step(x_BlZ, cache) for x_BlZ in parts], dim=1)

    expected = run()
    model.prefetch_weights()
    early = launches_early(labels.device)
    assert prefetching(model) == {early}
    found = run()
    assert torch.equal(found, expected) != early
    assert (found - expected).float().norm() < 0.02 * expected.float().norm()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        drawn = run()
    for _ in range(200):
        drawn.zero_()
        graph.replay()
        assert torch.equal(drawn, found)
