"""Kernels in CUDA C++, for what Triton cannot say: compiled when first launched, by NVRTC, which comes with torch."""

from __future__ import annotations

import ctypes
import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_TARGET = "sm_90a"  # the GPUs these kernels are for, with what only they have


@functools.cache
def is_nvrtc_there() -> bool:
    """Say whether NVRTC and its bindings are installed, as they are with torch for CUDA 12.9 and later."""
    try:
        _version()
    except (ImportError, RuntimeError, OSError):  # no bindings; no library
        return False
    return True


@dataclass(frozen=True)
class CudaKernel:
    """A kernel of this folder, for one block size. Compiled once for all processes: what comes of it lies in Triton's cache."""

    file: str  # its source
    name: str  # extern "C"
    macros: tuple[tuple[str, int], ...]  # defined before the source is read
    threads: int  # of a block
    shared_bytes: int  # of a block, dynamic

    def launch(self, blocks: int, *arguments: Tensor | int | None) -> None:
        """Launch it on the current device and stream. arguments: tensors and None are pointers, numbers int32.

        Raises RuntimeError with the words of the compiler or of the driver if it cannot be compiled, loaded or launched.
        """
        from cuda.bindings import driver

        pointers = [argument is None or isinstance(argument, Tensor) for argument in arguments]
        values = tuple(x.data_ptr() if isinstance(x, Tensor) else x or 0 for x in arguments)
        types = tuple(ctypes.c_void_p if is_pointer else ctypes.c_int for is_pointer in pointers)
        _enter_context()
        function = _loaded(self, torch.cuda.current_device())
        stream = torch.cuda.current_stream().cuda_stream
        _call(
            driver.cuLaunchKernel,
            *(function, blocks, 1, 1, self.threads, 1, 1, self.shared_bytes, stream, (values, types), 0),
        )

    def compiled(self) -> bytes:
        """The machine code. Raises RuntimeError with the compiler's words if there is none."""
        from triton.runtime.cache import get_cache_manager

        source, options = self._source(), self._options()
        key = hashlib.sha256(b"\0".join((source, *options, _version()))).hexdigest()
        cache, entry = get_cache_manager(key), f"{self.name}.cubin"
        path = cache.get_file(entry)
        if path is not None:
            return Path(path).read_bytes()
        code = _compile(source, options)
        cache.put(code, entry, binary=True)
        return code

    def _source(self) -> bytes:
        return (Path(__file__).parent / self.file).read_bytes()

    def _options(self) -> list[bytes]:
        macros = [f"-D{name}={value}".encode() for name, value in self.macros]
        return [f"--gpu-architecture={_TARGET}".encode(), *macros]


def _enter_context() -> None:
    """Make torch's context that of this thread, which has none before its first call of CUDA's runtime."""
    from cuda.bindings import driver

    if not int(_call(driver.cuCtxGetCurrent)):
        device = _call(driver.cuDeviceGet, torch.cuda.current_device())
        _call(driver.cuCtxSetCurrent, _call(driver.cuDevicePrimaryCtxRetain, device))


@functools.cache
def _loaded(kernel: CudaKernel, device: int) -> Any:
    """The kernel on a GPU, which is the current one."""
    from cuda.bindings import driver

    module = _call(driver.cuModuleLoadData, kernel.compiled())
    function = _call(driver.cuModuleGetFunction, module, kernel.name.encode())
    largest = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    _call(driver.cuFuncSetAttribute, function, largest, kernel.shared_bytes)
    return function


def _compile(source: bytes, options: list[bytes]) -> bytes:
    from cuda.bindings import nvrtc

    program = _call(nvrtc.nvrtcCreateProgram, source, b"", 0, [], [])
    try:
        (status,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
        if status:
            log = bytes(_call(nvrtc.nvrtcGetProgramLogSize, program))
            _call(nvrtc.nvrtcGetProgramLog, program, log)
            raise RuntimeError(f"NVRTC: {log.decode(errors='replace').strip(chr(0))}")
        code = bytes(_call(nvrtc.nvrtcGetCUBINSize, program))
        _call(nvrtc.nvrtcGetCUBIN, program, code)  # which fills it
        return code
    finally:
        _call(nvrtc.nvrtcDestroyProgram, program)


def _version() -> bytes:
    from cuda.bindings import nvrtc

    return repr(_call(nvrtc.nvrtcVersion)).encode()


def _call(function: Any, *arguments: Any) -> Any:
    """Call a function of the bindings, and return what it returns beside its status. Raises RuntimeError if it failed."""
    status, *values = function(*arguments)
    if status:
        raise RuntimeError(f"{function.__name__}: {status.name}")
    return values[0] if len(values) == 1 else values
