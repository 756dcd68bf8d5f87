"""Passes that leave rows in FP8 alone leave those that training rounds, and products of them are training's."""

from __future__ import annotations

import pytest
import torch

from varcli.kernels.fp8 import fp8_product, round_rows
from varcli.kernels.fp8_norm import rounded_gated_norm
from varcli.kernels.fp8_rows import Rows, gelu_to_rows, norm_to_rows, plain_rows, rows_product, to_rows
from varcli.kernels.gelu import biased_gelu
from varcli.kernels.norm import norm


def inputs(device: str = "cpu", length: int = 7, width: int = 48) -> list[torch.Tensor]:
    """Stream and branch (2, length, width), the branch's bias, gate, scale and shift."""
    generator = torch.Generator().manual_seed(0)
    stream, branch = torch.randn(2, 2, length, width, generator=generator).bfloat16().to(device).unbind()
    gate, scale, shift = torch.randn(2, 1, 6, width, generator=generator).bfloat16().to(device).unbind(2)[::2]
    bias = torch.randn(width, generator=generator).bfloat16().to(device)
    return [stream, branch, bias, gate, scale, shift]


def require_equal(found: Rows, rows: torch.Tensor, scales: torch.Tensor) -> None:
    """found: of any leading shape."""
    assert found.values.dtype == rows.dtype == torch.float8_e4m3fn and found.scales.shape[-1] == 1
    assert torch.equal(found.values.flatten(0, -2).view(torch.uint8), rows.view(torch.uint8))
    assert torch.equal(found.scales.flatten(0, -2), scales)


def test_products_of_rows_are_those_of_what_they_were():
    x, weight = inputs()[0], torch.linspace(-1, 1, 32 * 48).view(32, 48)
    rows = to_rows(x)
    assert rows.values.shape == (2, 7, 48) and rows.scales.shape == (2, 7, 1)
    found = rows_product(rows, *round_rows(weight))
    assert found.dtype == torch.bfloat16 and torch.equal(found, fp8_product(x, weight))


def test_rows_are_of_what_bfloat16_holds():
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    require_equal(plain_rows(x), *round_rows(x.bfloat16()))
    require_equal(to_rows(x.bfloat16()), *round_rows(x.bfloat16()))


def test_rows_of_a_norm_are_those_that_come_beside_it():
    given = inputs()
    expected_out, (_, rows, scales) = rounded_gated_norm(*given, 1e-6)
    out, found = norm_to_rows(*given, 1e-6)
    assert torch.equal(out, expected_out)
    require_equal(found, rows, scales)
    stream, *_, scale, shift = given
    out, found = norm_to_rows(stream, None, None, None, scale, shift, 1e-6)
    assert out is stream
    require_equal(found, *round_rows(norm(stream, scale, shift, 1e-6).flatten(0, 1)))


def test_rows_of_a_gelu_are_those_that_come_beside_it():
    before, _, bias, *_ = inputs()
    require_equal(gelu_to_rows(before, bias), *round_rows(biased_gelu(before, bias).flatten(0, 1)))


@pytest.mark.gpu
@pytest.mark.parametrize(("length", "width"), [(1, 48), (5, 1024), (680, 1920), (5000, 64)])
def test_on_a_gpu_rows_are_those_on_a_cpu(length, width):
    def results(device: str) -> list[Rows]:
        given = inputs(device, length, width)
        stream, _, bias, *_, scale, shift = given
        alone = norm_to_rows(stream, None, None, None, scale, shift, 1e-6)
        return [to_rows(stream), norm_to_rows(*given, 1e-6)[1], alone[1], gelu_to_rows(stream, bias)]

    for found, expected in zip(results("cuda"), results("cpu"), strict=True):
        assert found.values.shape == expected.values.shape
        # a norm that is a step of bfloat16 off may move its row's scale
        torch.testing.assert_close(found.scales.cpu(), expected.scales, rtol=2**-7, atol=0)
        wide, other = (rows.values.double().cpu() * rows.scales.double().cpu() for rows in (found, expected))
        assert (wide - other).norm() < 0.01 * other.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 2, 18, 512])
@pytest.mark.parametrize(("width", "out"), [(1024, 3072), (4096, 1024), (1920, 7680)])
def test_few_rows_have_products_on_a_gpu(tokens, width, out):
    """Sampling's: a single image without guidance begins with one row."""
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(tokens, width, generator=generator), torch.randn(out, width, generator=generator)
    expected = rows_product(to_rows(x.bfloat16()), *round_rows(weight)).double()
    found = rows_product(to_rows(x.bfloat16().cuda()), *(part.cuda() for part in round_rows(weight))).double().cpu()
    assert (found - expected).norm() < 0.01 * expected.norm()
