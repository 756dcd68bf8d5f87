"""The convolution with bias, skip path and moments in one pass: what it computes, and that torch.compile takes it whole."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import varcli
from varcli.kernels.conv3x3 import by_tap, conv3x3, introduce, is_gain
from varcli.kernels.group_norm import channel_moments


def given(dtype: torch.dtype, channels: int = 32, outputs: int = 144, device: str = "cpu") -> list[torch.Tensor]:
    """Maps, weight, bias and skip path: two samples of 16 x 24, whose rows are no power of two."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, channels, 16, 24), (outputs, channels, 3, 3), (outputs,), (2, outputs, 16, 24))
    x, weight, bias, skip = (torch.randn(shape, generator=generator).to(device) for shape in shapes)
    weight = weight / (9 * channels) ** 0.5
    return [part.to(dtype, memory_format=torch.channels_last) for part in (x, weight)] + [
        bias,
        skip.to(dtype, memory_format=torch.channels_last),
    ]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_convolution_with_bias_and_skip_path_is_rounded_once_and_its_moments_are_those_of_what_is_stored(dtype):
    x, weight, bias, skip = given(dtype)
    for parts in ((None, None), (bias, None), (None, skip), (bias, skip)):
        out, moments_2BC = conv3x3(x, weight, *parts)
        assert out.dtype == dtype and out.is_contiguous(memory_format=torch.channels_last)
        exact = F.conv2d(x.double(), weight.double(), padding=1)
        exact = exact + sum(
            part.double() if part.ndim > 1 else part[:, None, None] for part in parts if part is not None
        )
        limit = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-8}[dtype]
        torch.testing.assert_close(out.double(), exact, rtol=limit, atol=limit)
        torch.testing.assert_close(moments_2BC, channel_moments(out), rtol=1e-4, atol=1e-5)


def test_a_weight_laid_out_by_tap_is_equal_and_read_where_it_lies():
    x, weight, bias, skip = given(torch.bfloat16)
    laid_out = by_tap(weight)
    assert (
        torch.equal(laid_out, weight) and laid_out.permute(2, 3, 1, 0).flatten(0, 2).data_ptr() == laid_out.data_ptr()
    )
    assert laid_out.permute(2, 3, 1, 0).flatten(0, 2).is_contiguous()
    for found, expected in zip(conv3x3(x, laid_out, bias, skip), conv3x3(x, weight, bias, skip), strict=True):
        assert torch.equal(found, expected)


def test_sizes_and_devices_that_are_no_gain_are_left_to_libraries(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    for sizes in ((160, 160, 256 * 256), (320, 160, 128 * 128), (160, 160, 64 * 64)):
        assert is_gain(*sizes, cpu)
    # a multiple of what libraries' tiles are wide; a width, a side, and channels that were not timed or do not fit
    for sizes in ((160, 320, 128 * 128), (160, 192, 128 * 128), (160, 160, 8 * 8), (3, 160, 65536), (160, 3, 65536)):
        assert not is_gain(*sizes, cpu)
    for capability in ((9, 0), (8, 0), (12, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert is_gain(160, 160, 65536, gpu) == (capability == (9, 0))


@pytest.mark.parametrize("answer", [True, False])
def test_torch_compile_takes_the_answer_as_it_is(answer, monkeypatch):
    """The question is asked while a decoder is compiled, whose graph must not break at each convolution."""
    capability = (9, 0) if answer else (8, 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)

    def ask(x: torch.Tensor) -> torch.Tensor:
        return x + 1 if is_gain(160, 160, 65536, torch.device("cuda")) else x - 1

    introduce()
    torch.compiler.reset()
    compiled = torch.compile(ask, backend="aot_eager", fullgraph=True)
    assert compiled(torch.zeros(2))[0] == (1 if answer else -1)


def test_torch_compile_knows_the_operators_before_a_decoder_is_compiled():
    """A decoder of the released width is ready in seconds, where torch 2.11 took minutes for a line in its log."""
    names = ("conv3x3", "channel_sums", "add_residual", "add_with_margin", "interleave_phases", "scale_and_shift")
    code = (
        "import sys, torch; from varcli.kernels.conv3x3 import introduce; introduce();"
        "from torch._inductor.lowering import lowerings;"
        f"sys.exit(str([name for name in {names} if getattr(torch.ops.varcli, name).default not in lowerings] or ''))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(varcli.__file__).parents[1], capture_output=True, text=True
    )
    assert not done.stderr.strip(), done.stderr


def test_the_operator_keeps_torchs_rules_and_compiles_whole():
    x, weight, bias, skip = given(torch.float32)
    tokens = [part.flatten(2).transpose(1, 2).contiguous() for part in (x, skip)]
    rows = weight.permute(2, 3, 1, 0).flatten(0, 2).contiguous()
    for parts in ((bias, tokens[1]), (None, None)):
        torch.library.opcheck(torch.ops.varcli.conv3x3, (tokens[0], rows, *parts, 16, 24))
    compiled = torch.compile(conv3x3, backend="aot_eager", fullgraph=True)
    for actual, expected in zip(compiled(x, weight, bias, skip), conv3x3(x, weight, bias, skip)):
        torch.testing.assert_close(actual, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("channels", "outputs"), [(160, 160), (320, 160), (32, 192), (64, 144)])
def test_a_gpu_computes_the_formula(channels, outputs, dtype):
    x, weight, bias, skip = given(dtype, channels, outputs)
    for parts in ((None, None), (bias, skip)):
        expected = conv3x3(x.double(), weight.double(), *(None if part is None else part.double() for part in parts))
        found = conv3x3(*(None if part is None else part.cuda() for part in (x, weight, *parts)))
        for actual, exact in zip(found, expected):
            assert (actual.cpu().double() - exact).norm() / exact.norm() < 4e-3
