"""The head and its cross entropy in pieces: the numbers and gradients of all logits at once."""

from __future__ import annotations

import pytest
import torch

from varcli.kernels.cross_entropy import linear_cross_entropy, linear_cross_entropy_reference


def inputs(dtype: torch.dtype = torch.float64) -> tuple[list[torch.Tensor], torch.Tensor]:
    """What goes in, weight and bias, and targets of 37 rows and 23 codes."""
    generator = torch.Generator().manual_seed(0)
    h, weight, bias = (torch.randn(size, generator=generator).to(dtype) for size in ((37, 16), (23, 16), (23,)))
    return [tensor.requires_grad_() for tensor in (h, weight, bias)], torch.randint(23, (37,), generator=generator)


@pytest.mark.parametrize("rows", [1, 10, 37, 1000])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_pieces_of_any_size_equal_all_logits_at_once(rows, label_smoothing):
    given, targets = inputs()
    expected = linear_cross_entropy_reference(*given, targets, label_smoothing)
    actual = linear_cross_entropy(*given, targets, label_smoothing, rows=rows)
    for piece, whole in zip(actual, expected, strict=True):
        torch.testing.assert_close(piece, whole)
    grads = [torch.autograd.grad(0.5 * loss, given) for loss in (actual[0], expected[0])]
    for piece, whole in zip(*grads, strict=True):
        torch.testing.assert_close(piece, whole)
    assert not actual[1].requires_grad and not actual[2].requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_products_stay_near_float64(dtype):
    given, targets = inputs(torch.float32)
    expected = linear_cross_entropy_reference(*(tensor.double() for tensor in given), targets)[0]
    with torch.autocast("cpu", dtype):
        actual = linear_cross_entropy(*given, targets, dtype=dtype, rows=10)
    eps = torch.finfo(dtype).eps
    assert actual[0].dtype == torch.float32 and actual[0].item() == pytest.approx(expected.item(), rel=eps)
    for piece, whole in zip(torch.autograd.grad(actual[0], given), torch.autograd.grad(expected, given)):
        assert piece.dtype == torch.float32
        assert (piece - whole).norm() < eps * whole.norm()


def test_it_compiles_as_one_graph():
    given, targets = inputs(torch.float32)
    compiled = torch.compile(linear_cross_entropy, backend="aot_eager", fullgraph=True)
    losses = [call(*given, targets, 0.1, rows=10)[0] for call in (compiled, linear_cross_entropy)]
    for actual, expected in zip(*(torch.autograd.grad(loss, given) for loss in losses)):
        torch.testing.assert_close(actual, expected)
