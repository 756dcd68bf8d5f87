"""Operators of group norms: what they compute, in which layout, and that torch.compile takes them whole."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from varcli.kernels.group_norm import (
    ROWS,
    add_residual,
    add_residual_with_margin,
    channel_moments,
    interleave_phases,
    scale_and_shift,
)


def maps(count: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Maps with channels last whose positions are several chunks of sums, the last one not full."""
    generator = torch.Generator().manual_seed(0)
    shape = (2, 6, 25, 23)
    assert ROWS < 25 * 23 < 3 * ROWS
    return [torch.randn(shape, generator=generator).to(dtype, memory_format=torch.channels_last) for _ in range(count)]


def test_moments_are_means_of_values_and_squares_with_the_bias():
    (x,) = maps(1)
    bias = torch.linspace(-1, 1, 6)
    for found, values in ((channel_moments(x), x), (channel_moments(x, bias), x + bias[:, None, None])):
        expected = torch.stack([values.mean(dim=(2, 3)), values.square().mean(dim=(2, 3))])
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_residual_is_rounded_once_and_its_moments_are_those_of_what_is_stored(dtype):
    x, y = maps(2, dtype)
    bias = torch.linspace(-1, 1, 6)
    out, moments_2BC = add_residual(x, y, bias)
    assert out.dtype == dtype and out.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(out, (x.float() + y.float() + bias[:, None, None]).to(dtype))
    torch.testing.assert_close(moments_2BC, channel_moments(out))


def test_a_margin_is_a_row_and_a_column_of_zeros_after_the_others():
    x, y = maps(2, torch.bfloat16)
    bias = torch.linspace(-1, 1, 6)
    found = add_residual_with_margin(x, y, bias)
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(found, F.pad(add_residual(x, y, bias)[0], (0, 1, 0, 1)))


@pytest.mark.parametrize("is_activated", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_are_scaled_shifted_and_activated_with_one_rounding(dtype, is_activated):
    (x,) = maps(1, dtype)
    scale, shift = torch.randn(2, 2, 6, generator=torch.Generator().manual_seed(1))
    found = scale_and_shift(x, scale, shift, is_activated)
    assert found.dtype == dtype and found.is_contiguous(memory_format=torch.channels_last)
    exact = x.double() * scale.double()[:, :, None, None] + shift.double()[:, :, None, None]
    exact = (F.silu(exact) if is_activated else exact).to(dtype)
    torch.testing.assert_close(found, exact, rtol=1e-5 if dtype == torch.float32 else 2**-7, atol=1e-5)


def test_phases_take_turns_and_odd_ones_begin_one_place_later():
    phases = torch.randn(2, 4 * 3, 5, 4)
    bias = torch.linspace(-1, 1, 3)
    found, moments_2BC = interleave_phases(phases, bias)
    assert found.shape == (2, 3, 8, 6)
    for row in range(8):
        for column in range(6):
            phase = 2 * (row % 2) + column % 2
            expected = phases[:, 3 * phase : 3 * phase + 3, row // 2 + row % 2, column // 2 + column % 2] + bias
            assert torch.equal(found[:, :, row, column], expected)
    torch.testing.assert_close(moments_2BC, channel_moments(found))


def test_the_operators_keep_torchs_rules():
    x, y = (tensor.flatten(2).transpose(1, 2) for tensor in maps(2))
    bias, factors = torch.randn(6), torch.randn(2, 6)
    for given in (bias, None):
        torch.library.opcheck(torch.ops.varcli.channel_sums.default, (x, given))
    torch.library.opcheck(torch.ops.varcli.add_residual.default, (x, y, bias))
    torch.library.opcheck(torch.ops.varcli.add_with_margin.default, (x, y, bias, 25, 23))
    torch.library.opcheck(torch.ops.varcli.scale_and_shift.default, (x, factors, factors, True))
    torch.library.opcheck(torch.ops.varcli.interleave_phases.default, (torch.randn(2, 4 * 3, 8), bias[:2], 3, 2))


def test_torch_compile_takes_them_as_they_are():
    def compute(x, y, bias):
        out, moments_2BC = add_residual(x, y, bias)
        return scale_and_shift(out, *moments_2BC, True) + channel_moments(out, bias)[1, :, :, None, None]

    given = *maps(2), torch.linspace(-1, 1, 6)
    found = torch.compile(compute, backend="aot_eager", fullgraph=True)(*given)
    torch.testing.assert_close(found, compute(*given))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(2, 160, 65, 33), (3, 40, 8, 8), (1, 640, 16, 16), (2, 3, 9, 9)])
def test_on_a_gpu_they_compute_what_they_do_on_a_cpu(shape, dtype):
    torch.manual_seed(0)
    x, y = (torch.randn(shape, device="cuda").to(dtype, memory_format=torch.channels_last) for _ in range(2))
    bias = torch.randn(shape[1], device="cuda")
    factors = torch.randn(2, *shape[:2], device="cuda")
    phases = torch.randn(shape[0], 4 * shape[1], 18, 13, device="cuda").to(dtype, memory_format=torch.channels_last)

    def compute(x, y, bias, factors, phases):
        stored = *add_residual(x, y, bias), *add_residual(x, None, bias), *interleave_phases(phases, bias)
        scaled = [scale_and_shift(x, *factors, is_activated) for is_activated in (False, True)]
        stored = *stored, add_residual_with_margin(x, y, bias)
        return [*stored, channel_moments(x), channel_moments(x, bias), *scaled]

    found = compute(x, y, bias, factors, phases)
    expected = compute(*(tensor.cpu() for tensor in (x, y, bias, factors, phases)))
    for actual, wanted in zip(found, expected, strict=True):
        rounding = 1e-5 if wanted.dtype == torch.float32 else torch.finfo(wanted.dtype).eps
        torch.testing.assert_close(actual.cpu(), wanted, rtol=rounding, atol=1e-5)
