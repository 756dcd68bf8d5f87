"""The convolution with bias, skip path and moments in one pass: what it computes, and that torch.compile takes it whole."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import varcli
from varcli.kernels import HAS_TRITON
from varcli.kernels.conv3x3 import COLUMNS, conv3x3, introduce, is_gain, num_sums, packed, tile_rows
from varcli.kernels.group_norm import channel_moments, scale_and_shift
from varcli.kernels.nvrtc import is_nvrtc_there


def given(
    dtype: torch.dtype, channels: int = 32, outputs: int = 160, batch: int = 2, height: int = 6, width: int = 64
) -> list[torch.Tensor]:
    """Maps, weight, bias and skip path."""
    generator = torch.Generator().manual_seed(0)
    sides = height, width
    shapes = ((batch, channels, *sides), (outputs, channels, 3, 3), (outputs,), (batch, outputs, *sides))
    x, weight, bias, skip = (torch.randn(shape, generator=generator) for shape in shapes)
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


def test_maps_can_be_normalised_on_the_way():
    x, weight, bias, skip = given(torch.bfloat16)
    factors = torch.randn(2, len(x), x.shape[1], generator=torch.Generator().manual_seed(1)).unbind()
    expected = conv3x3(scale_and_shift(x, *factors, True), weight, bias, skip)
    for found, wanted in zip(conv3x3(x, weight, bias, skip, factors), expected, strict=True):
        assert torch.equal(found, wanted)


def test_sizes_and_devices_that_are_no_gain_are_left_to_libraries(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    for sizes in ((160, 160, 256, 256), (320, 160, 128, 128), (160, 160, 6, 64), (32, 160, 256, 192)):
        assert is_gain(*sizes, cpu)
    # channels and sides that do not fit or were not timed, and a map of too many values
    unfit = ((160, 192, 128, 128), (160, 160, 32, 32), (3, 160, 256, 256), (160, 3, 256, 256), (160, 160, 5, 64))
    for sizes in (*unfit, (160, 160, 4096, 4096)):
        assert not is_gain(*sizes, cpu)
    for capability in ((9, 0), (8, 0), (12, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert is_gain(160, 160, 256, 256, gpu) == (capability == (9, 0) and HAS_TRITON and is_nvrtc_there())


def test_tiles_cover_a_map_and_each_leaves_two_rows_of_sums():
    for batch, height, width in ((1, 256, 256), (32, 256, 256), (1, 128, 128), (64, 6, 64)):
        rows = tile_rows(batch, height, width, COLUMNS)
        assert height % rows == 0 and num_sums(batch, height, width, COLUMNS) * 32 * rows == height * width
    assert tile_rows(32, 256, 256, COLUMNS) == 4 and tile_rows(1, 128, 128, COLUMNS) == 2


@pytest.mark.parametrize("answer", [True, False])
def test_torch_compile_takes_the_answer_as_it_is(answer, monkeypatch):
    """The question is asked while a decoder is compiled, whose graph must not break at each convolution."""
    capability = (9, 0) if answer else (8, 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)

    def ask(x: torch.Tensor) -> torch.Tensor:
        return x + 1 if is_gain(160, 160, 256, 256, torch.device("cuda")) else x - 1

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
    factors = torch.ones(2, 2, 32).unbind()
    for parts in ((bias, tokens[1], *factors), (None, None, None, None)):
        torch.library.opcheck(torch.ops.varcli.conv3x3, (tokens[0], packed(weight), *parts, 6, 64))
    compiled = torch.compile(conv3x3, backend="aot_eager", fullgraph=True)
    for actual, expected in zip(compiled(x, weight, bias, skip), conv3x3(x, weight, bias, skip)):
        torch.testing.assert_close(actual, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "sizes",  # tiles of two and of four rows, one a block and several, one chunk and many
    [
        (160, 160, 2, 64, 64),
        (320, 160, 1, 6, 192),
        (32, 160, 40, 128, 128),
        (64, 320, 3, 20, 64),
        (160, 160, 1, 128, 256),
        (160, 160, 9, 128, 128),
        (320, 160, 10, 128, 128),
    ],
)
def test_a_gpu_computes_the_formula(sizes, dtype):
    x, weight, bias, skip = (part.cuda() for part in given(dtype, *sizes))
    factors = torch.randn(2, len(x), x.shape[1], generator=torch.Generator().manual_seed(1)).cuda().unbind()
    for parts in ((None, None), (bias, skip), (bias, None), (bias, skip, factors), (None, None, factors)):
        seen = scale_and_shift(x, *factors, True) if len(parts) == 3 else x
        expected = F.conv2d(seen.float(), weight.float(), parts[0], padding=1)
        expected += 0 if parts[1] is None else skip.float()
        out, moments = conv3x3(x, weight, *parts)
        assert (out.float() - expected).norm() / expected.norm() < 4e-3
        assert (out.float() - expected).abs().max() < 0.05 * expected.abs().max()  # nor is a tile wrong
        torch.testing.assert_close(moments, channel_moments(out).float(), rtol=1e-3, atol=1e-4)
        for again, before in zip(conv3x3(x, weight, *parts), (out, moments)):
            assert torch.equal(again, before)


@pytest.mark.gpu
def test_a_gpu_takes_no_maps_at_all_too():
    x, weight, bias, skip = (part.cuda() for part in given(torch.bfloat16))
    out, _ = conv3x3(x[:0], weight, bias, skip[:0])
    assert out.shape == skip[:0].shape
