"""GELU with its bias inside: torch's values, and gradients that need one pass."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from varcli.kernels.gelu import biased_gelu


def inputs(dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """A product (3, 4, 5) that reaches both flat ends, and its bias."""
    generator = torch.Generator().manual_seed(0)
    before = 4 * torch.randn(3, 4, 5, generator=generator).to(dtype)
    bias = torch.randn(5, generator=generator, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    return [before.requires_grad_(), bias.requires_grad_()]


def test_values_are_torchs():
    before, bias = inputs()
    torch.testing.assert_close(biased_gelu(before, bias), F.gelu(before + bias, approximate="tanh"))


def test_gradients_equal_finite_differences():
    assert torch.autograd.gradcheck(biased_gelu, inputs())


def test_the_bias_of_half_precision_products_has_a_float32_gradient():
    before, bias = inputs(torch.bfloat16)
    wide = [tensor.detach().double().requires_grad_() for tensor in (before, bias)]
    biased_gelu(before, bias).sum().backward()
    F.gelu(wide[0] + wide[1], approximate="tanh").sum().backward()
    assert before.grad.dtype == torch.bfloat16
    torch.testing.assert_close(bias.grad.double(), wide[1].grad, rtol=1e-5, atol=1e-5)


def test_compiled_gradients_equal_eager_ones():
    given = inputs(torch.float32)
    eager = torch.autograd.grad(biased_gelu(*given).sin().sum(), given)
    compiled = torch.compile(biased_gelu, backend="aot_eager", fullgraph=True)
    for actual, expected in zip(torch.autograd.grad(compiled(*given).sin().sum(), given), eager, strict=True):
        torch.testing.assert_close(actual, expected)
