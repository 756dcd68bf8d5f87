"""The norm that comes with its rows in FP8 is the one without, and they are its rows."""

from __future__ import annotations

import pytest
import torch

from varcli.kernels.fp8 import fp8_product, round_rows
from varcli.kernels.fp8_norm import rounded_gated_norm
from varcli.kernels.norm import gated_norm


def inputs(device: str, length: int, width: int) -> list[torch.Tensor]:
    """Stream and branch (2, length, width), the branch's bias, gate, scale and shift."""
    generator = torch.Generator().manual_seed(0)
    stream, branch = torch.randn(2, 2, length, width, generator=generator).bfloat16().to(device).unbind()
    vectors = torch.randn(2, 1, 6, width, generator=generator).bfloat16().to(device)
    bias = torch.randn(width, generator=generator).to(device)
    gate, scale, shift = vectors.unbind(2)[::2]
    return [tensor.detach().requires_grad_() for tensor in (stream, branch, bias, gate, scale, shift)]


def layers(norm, *given: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the stream, what a product in FP8 makes of its norm, and a sum of both to differentiate."""
    weight = torch.linspace(-1, 1, 32 * given[0].shape[2], device=given[0].device).view(32, -1)
    out, normed = norm(*given, 1e-6)
    y = fp8_product(normed, weight)
    return out, y, out.float().sin().sum() + y.float().cos().sum()


def results(function, *given: torch.Tensor) -> list[torch.Tensor]:
    out, y, total = function(*given)
    return [out.detach(), y.detach(), *torch.autograd.grad(total, given)]


@pytest.mark.parametrize("compiled", [False, True])
def test_it_equals_the_norm_whose_rows_are_rounded_afterwards(compiled):
    given = inputs("cpu", 7, 48)
    expected = results(lambda *given: layers(gated_norm, *given), *given)

    def function(*given):
        return layers(rounded_gated_norm, *given)

    found = results(torch.compile(function, backend="aot_eager", fullgraph=True) if compiled else function, *given)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("length", "width"), [(5, 48), (680, 1024), (65, 2304)])
def test_on_a_gpu_its_rows_are_those_of_its_norm(length, width, compiled):
    function = torch.compile(rounded_gated_norm, fullgraph=True) if compiled else rounded_gated_norm
    out, (normed, rows, scales) = function(*inputs("cuda", length, width), 1e-6)
    expected_rows, expected_scales = round_rows(normed.detach().flatten(0, 1))
    torch.testing.assert_close(scales, expected_scales, rtol=1e-6, atol=0)
    is_same = rows.view(torch.uint8) == expected_rows.view(torch.uint8)
    assert is_same.double().mean().item() > 0.999  # all but what lies in the middle of two steps
    assert torch.equal(out, gated_norm(*inputs("cuda", length, width), 1e-6)[0])
