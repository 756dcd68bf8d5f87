"""Kernels in CUDA C++: compiled once wherever NVRTC is, and launched from any thread."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
import torch

from varcli.kernels import HAS_TRITON, nvrtc
from varcli.kernels.conv3x3 import COLUMNS, DEPTH, conv3x3, packed
from varcli.kernels.conv3x3_cuda import kernel_for
from varcli.kernels.nvrtc import is_nvrtc_there

compiles = pytest.mark.skipif(not (HAS_TRITON and is_nvrtc_there()), reason="no compiler for CUDA is installed")


@compiles
@pytest.mark.parametrize("rows", [2, 4])
@pytest.mark.parametrize("is_fp16", [False, True])
def test_the_kernel_compiles_anywhere_once_and_fits_a_multiprocessor(rows, is_fp16, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = kernel_for(is_fp16, rows, 2 * COLUMNS)
    code = kernel.compiled()
    assert code[:4] == b"\x7fELF" and kernel.shared_bytes <= 227 * 1024
    monkeypatch.setattr(nvrtc, "_compile", None)
    assert kernel.compiled() == code


@compiles
def test_a_kernel_that_does_not_compile_says_why():
    with pytest.raises(RuntimeError, match="TILE_ROWS"):
        replace(kernel_for(False, 2, COLUMNS), macros=(("HALF", 0),)).compiled()


@pytest.mark.parametrize("error", [ModuleNotFoundError, RuntimeError, OSError])
def test_a_compiler_that_cannot_be_loaded_is_not_there(error, monkeypatch):
    def fail() -> bytes:
        raise error

    monkeypatch.setattr(nvrtc, "_version", fail)
    assert not is_nvrtc_there.__wrapped__()


@pytest.mark.gpu
def test_a_thread_that_calls_nothing_of_cuda_before_launches():
    maps = torch.randn(1, DEPTH, 2, 64, device="cuda").bfloat16().to(memory_format=torch.channels_last)
    weight = packed(torch.randn(COLUMNS, DEPTH, 3, 3, device="cuda").bfloat16())
    expected, _ = conv3x3(maps, weight)
    torch.cuda.synchronize()
    found = []
    thread = threading.Thread(target=lambda: found.append(conv3x3(maps, weight)))
    thread.start()
    thread.join()
    assert torch.equal(found[0][0], expected)
