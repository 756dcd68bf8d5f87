"""However a convolution is computed, it is the same function with the same gradients."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from varcli.kernels.group_norm import channel_moments
from varcli.tokenizer.convolutions import Downsample, ImageConv2d, Upsample, is_half


def assert_the_same(plain: torch.Tensor, other: torch.Tensor, wanted: list[torch.Tensor], **tolerance: float) -> None:
    """Two results of the same inputs are equal within rounding, and their gradients too."""
    torch.testing.assert_close(other, plain, **tolerance)
    generator = torch.Generator().manual_seed(3)
    cotangent = torch.randn(plain.shape, generator=generator, dtype=plain.dtype)
    for expected, found in zip(
        torch.autograd.grad(plain, wanted, cotangent), torch.autograd.grad(other, wanted, cotangent), strict=True
    ):
        torch.testing.assert_close(found, expected, **tolerance)


@pytest.mark.parametrize("has_autocast", [False, True])
def test_float64_is_never_half_precision(has_autocast, monkeypatch):
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: has_autocast)
    halves = {dtype for dtype in (torch.float64, torch.float32, torch.float16) if is_half(torch.empty(1, dtype=dtype))}
    assert halves == {torch.float16} | ({torch.float32} if has_autocast else set())


@pytest.mark.parametrize(("channels_in", "channels_out"), [(3, 20), (20, 3), (16, 16)])
def test_channels_added_to_a_convolution_change_nothing(channels_in, channels_out):
    convolution = ImageConv2d(channels_in, channels_out)
    images = torch.randn(2, channels_in, 9, 7, requires_grad=True)
    plain, padded = convolution(images), convolution.padded_forward(images)
    assert_the_same(plain, padded, [images, *convolution.parameters()], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("side", [(9, 7), (1, 1), (2, 3)])
def test_a_convolution_is_the_sum_of_its_shifted_taps(side, layout):
    torch.manual_seed(0)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-4)):
        convolution = ImageConv2d(20, 3).to(dtype)
        maps = torch.randn(2, 20, *side, dtype=dtype).to(memory_format=layout).requires_grad_()
        plain, by_taps = convolution(maps), convolution.tapwise_forward(maps)
        assert_the_same(plain, by_taps, [maps, *convolution.parameters()], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("side", [(9, 7), (1, 1), (2, 3)])
def test_a_convolution_is_a_product_of_what_each_pixel_sees(side, layout):
    torch.manual_seed(0)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-4)):
        convolution = ImageConv2d(3, 20).to(dtype)
        images = torch.randn(2, 3, *side, dtype=dtype).to(memory_format=layout).requires_grad_()
        plain, gathered = convolution(images), convolution.gathered_forward(images)
        assert gathered.is_contiguous(memory_format=torch.channels_last)
        assert_the_same(plain, gathered, [images, *convolution.parameters()], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_by_taps_is_as_near_as_a_rounded_result(dtype):
    torch.manual_seed(0)
    convolution = ImageConv2d(160, 3).requires_grad_(False)
    rounded = copy.deepcopy(convolution).to(dtype).double()
    maps = torch.randn(2, 160, 32, 32).to(dtype)
    exact = F.conv2d(maps.double(), rounded.weight, convolution.bias.double(), padding=1)
    with torch.autocast("cpu", dtype):
        found = convolution.tapwise_forward(maps)
    assert found.dtype == torch.float32

    def error(result: torch.Tensor) -> float:
        return (result.double() - exact).square().mean().sqrt().item()

    assert error(found) < 1.1 * error(exact.to(dtype))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("side", [(4, 5), (1, 1), (2, 3)])
def test_upsampling_by_phases_is_the_convolution_of_the_doubled_map(side, layout):
    torch.manual_seed(0)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        upsample = Upsample(6).to(dtype).requires_grad_(False)
        maps = torch.randn(2, 6, *side, dtype=dtype).to(memory_format=layout)
        found, moments_2BC = upsample.fused_forward(maps)
        torch.testing.assert_close(found, upsample(maps), rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(moments_2BC, channel_moments(found), rtol=tolerance, atol=tolerance)


def test_the_rounded_weights_of_phases_cost_no_more_than_rounded_weights():
    torch.manual_seed(0)
    upsample = Upsample(32).requires_grad_(False)
    upsample.conv.bias.zero_()  # on a CPU a convolution adds its own before it rounds
    maps = torch.randn(2, 32, 16, 16).bfloat16()
    exact = copy.deepcopy(upsample).double()(maps.double())
    with torch.autocast("cpu", torch.bfloat16):
        plain, (by_phases, _) = upsample(maps), upsample.fused_forward(maps)
    assert (by_phases.double() - exact).norm() < 1.1 * (plain.double() - exact).norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_kept_phases_are_those_added_up_at_each_call(dtype):
    torch.manual_seed(0)
    upsample, maps = Upsample(16), torch.randn(2, 16, 5, 5).to(dtype)
    with torch.autocast("cpu", dtype):
        expected = upsample.fused_forward(maps)
        upsample.keep_phases_in(dtype)
        for found, other in zip(upsample.fused_forward(maps), expected, strict=True):
            assert torch.equal(found, other)
    assert "phases" not in upsample.state_dict()


def test_fused_downsampling_is_the_same_function_and_knows_its_moments():
    torch.manual_seed(0)
    downsample = Downsample(6).requires_grad_(False)
    maps = torch.randn(2, 6, 8, 12)
    found, moments_2BC = downsample.fused_forward(F.pad(maps, (0, 1, 0, 1)))
    torch.testing.assert_close(found, downsample(maps))
    torch.testing.assert_close(moments_2BC, channel_moments(found))
