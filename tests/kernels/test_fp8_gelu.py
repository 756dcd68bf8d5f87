"""Feed-forward layers in FP8 are the products and the GELU that they join."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from varcli.kernels.fp8_gelu import fp8_feed_forward, fp8_feed_forward_reference


def inputs(device: str = "cpu", tokens: int = 13, width: int = 64, hidden: int = 160) -> list[torch.Tensor]:
    """Features (2, tokens, width), two weights with the bias between them, and the gradient to the result."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, tokens, width), (hidden, width), (hidden,), (width, hidden), (2, tokens, width)]
    x, weight1, bias1, weight2, grad = (torch.randn(shape, generator=generator) for shape in shapes)
    given = [x.bfloat16(), 0.2 * weight1, bias1, 0.1 * weight2]
    return [*(tensor.to(device).requires_grad_() for tensor in given), (1e-5 * grad).bfloat16().to(device)]


def results(layers, *given: torch.Tensor) -> list[torch.Tensor]:
    y = layers(*given[:4])
    return [y.detach(), *torch.autograd.grad(y, given[:4], given[4])]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_they_equal_what_is_taken_step_by_step(compiled, autocast):
    given = inputs()
    expected = results(fp8_feed_forward_reference, *given)
    layers = torch.compile(fp8_feed_forward, backend="aot_eager", fullgraph=True) if compiled else fp8_feed_forward
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = results(layers, *given)
    for actual, other in zip(found, expected, strict=True):
        assert actual.dtype == other.dtype
        assert torch.equal(actual, other)


class Products(TorchDispatchMode):
    """Counts the matrix products that are computed while it is on."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten.mm.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("learned", "products"), [((0,), 2), ((0, 2), 2), ((2,), 1), ((3,), 1), ((1, 2, 3), 3), ((0, 1, 2, 3), 4)]
)
def test_no_product_is_computed_for_what_is_frozen(learned, products):
    """learned: which of features, first weight, bias and second weight have gradients, equal to those when all have."""
    *given, grad = inputs()
    expected = torch.autograd.grad(fp8_feed_forward(*given), given, grad)
    y = fp8_feed_forward(*(tensor if at in learned else tensor.detach() for at, tensor in enumerate(given)))
    with Products() as counted:
        found = torch.autograd.grad(y, [given[at] for at in learned], grad)
    assert counted.count == products
    assert all(torch.equal(actual, expected[at]) for actual, at in zip(found, learned, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("tokens", "width", "hidden"), [(5, 64, 160), (680, 1024, 4096), (65, 1920, 7680)])
def test_on_a_gpu_they_equal_what_is_taken_step_by_step_on_a_cpu(tokens, width, hidden, compiled):
    expected = results(fp8_feed_forward_reference, *inputs("cpu", tokens, width, hidden))
    layers = torch.compile(fp8_feed_forward, fullgraph=True) if compiled else fp8_feed_forward
    found = results(layers, *inputs("cuda", tokens, width, hidden))
    for actual, other in zip(found, expected, strict=True):
        # a scale that differs in its last bit, or another order of a sum, moves some entries by a step
        assert ((actual.cpu().double() - other.double()).norm() / other.double().norm()).item() < 0.02
