"""Queries and keys of unit length: the operator's formulas are the reference's, with gradients of overlapping pieces."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from varcli.kernels.qk import normalized_steps, normalized_steps_reference

CAP = math.log(100)
LENGTHS = (1, 3, 5)


def inputs(dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """qkv, both biases and log_scale of two heads with 4 channels."""
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(2, sum(LENGTHS), 24, generator=generator).to(dtype)
    biases = torch.randn(2, 8, generator=generator, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    log_scale = torch.tensor([0.5, 1.5], dtype=biases.dtype).view(1, 2, 1, 1)
    return [tensor.requires_grad_() for tensor in (qkv, *biases, log_scale)]


def flat(steps) -> list[torch.Tensor]:
    return [part for step in steps for part in step]


def test_steps_equal_the_reference():
    given = inputs()
    for actual, expected in zip(
        flat(normalized_steps(*given, CAP, LENGTHS)),
        flat(normalized_steps_reference(*given, CAP, LENGTHS)),
        strict=True,
    ):
        torch.testing.assert_close(actual, expected)


def test_gradients_equal_finite_differences():
    assert torch.autograd.gradcheck(lambda *given: tuple(flat(normalized_steps(*given, CAP, LENGTHS))), inputs())


def test_a_temperature_above_its_cap_has_no_gradient():
    qkv, q_bias, v_bias, _ = inputs()
    log_scale = torch.tensor([CAP + 0.1, CAP - 0.1], dtype=torch.float64, requires_grad=True)
    steps = normalized_steps(qkv, q_bias, v_bias, log_scale, CAP, LENGTHS)
    torch.testing.assert_close(steps[0][0][:, 0].norm(dim=-1), torch.full((2, 1), 100.0, dtype=torch.float64))
    sum((q * torch.arange(4.0)).sum() for q, _, _ in steps).backward()
    assert log_scale.grad[0] == 0 != log_scale.grad[1]


def test_vectors_of_no_length_have_finite_gradients():
    given = [tensor.detach().zero_().requires_grad_() for tensor in inputs()]
    sum(part.sum() for part in flat(normalized_steps(*given, CAP, LENGTHS))).backward()
    assert all(tensor.grad.isfinite().all() for tensor in given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_gradients_equal_eager_ones(dtype):
    def attend(*given):
        steps = normalized_steps(*given, CAP, LENGTHS)
        parts = [F.scaled_dot_product_attention(*step, scale=1.0).transpose(1, 2) for step in steps]
        return torch.cat(parts, dim=1).float().sin().sum()

    given = inputs(dtype)
    eager = torch.autograd.grad(attend(*given), given)
    compiled = torch.autograd.grad(torch.compile(attend, backend="aot_eager", fullgraph=True)(*given), given)
    for actual, expected in zip(compiled, eager, strict=True):
        torch.testing.assert_close(actual, expected)
