"""Norm operators: their formulas are the references', they have gradients, and torch.compile takes them whole."""

from __future__ import annotations

import pytest
import torch

from varcli.kernels.norm import gated_norm, gated_norm_reference, norm, norm_reference


def inputs(dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """Stream, branch, bias, gate, scale and shift; the last three are parts of one tensor, as in a block."""
    generator = torch.Generator().manual_seed(0)
    stream, branch = torch.randn(2, 2, 5, 6, generator=generator).to(dtype)
    gate, scale, shift = torch.randn(2, 1, 6, 6, generator=generator).to(dtype).unbind(2)[::2]
    bias = torch.randn(6, generator=generator, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    return [tensor.requires_grad_() for tensor in (stream, branch, bias, gate, scale, shift)]


def test_forward_passes_equal_the_references():
    stream, branch, bias, gate, scale, shift = inputs()
    for given in (bias, None):
        both = [call(stream, branch, given, gate, scale, shift, 1e-6) for call in (gated_norm, gated_norm_reference)]
        for actual, expected in zip(*both, strict=True):
            torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(norm(stream, scale, shift, 1e-6), norm_reference(stream, scale, shift, 1e-6))


def test_gradients_equal_finite_differences():
    stream, branch, bias, gate, scale, shift = inputs()
    biased = (stream, branch, bias, gate, scale, shift)
    assert torch.autograd.gradcheck(lambda *given: gated_norm(*given, 1e-6), biased)
    plain = (stream, branch, gate, scale, shift)
    assert torch.autograd.gradcheck(lambda x, y, *given: gated_norm(x, y, None, *given, 1e-6), plain)
    assert torch.autograd.gradcheck(lambda *given: norm(*given, 1e-6), (stream, scale, shift))


def test_half_precision_is_rounded_once_on_the_way_out():
    given = inputs(torch.bfloat16)
    with torch.no_grad():
        out, normed = gated_norm(*given, 1e-6)
        exact, _ = gated_norm_reference(*(tensor.double() for tensor in given), 1e-6)
        expected = norm_reference(out.double(), *(tensor.double() for tensor in given[4:]), 1e-6)
    assert out.dtype == normed.dtype == torch.bfloat16
    assert ((out - exact).abs() <= exact.abs() / 256).all()
    assert ((normed - expected).abs() <= expected.abs() / 256 + 1e-6).all()


def test_the_operators_keep_torchs_rules():
    stream, branch, bias, gate, scale, shift = inputs(torch.float32)
    torch.library.opcheck(torch.ops.varcli.gated_norm.default, (stream, branch, bias, gate, scale, shift, 1e-6))
    torch.library.opcheck(torch.ops.varcli.gated_norm.default, (stream, branch, None, gate, scale, shift, 1e-6))
    torch.library.opcheck(torch.ops.varcli.norm.default, (stream, scale, shift, 1e-6))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_gradients_equal_eager_ones(dtype):
    def compute(*given):
        out, normed = gated_norm(*given, 1e-6)
        return (out.float().sin() + normed.float().cos() + norm(out, *given[4:], 1e-6).float()).sum()

    given = inputs(dtype)
    eager = torch.autograd.grad(compute(*given), given)
    compiled = torch.autograd.grad(torch.compile(compute, backend="aot_eager", fullgraph=True)(*given), given)
    for actual, expected in zip(compiled, eager, strict=True):
        torch.testing.assert_close(actual, expected)
