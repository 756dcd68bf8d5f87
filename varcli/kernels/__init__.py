"""Passes over tensors that torch.compile does not join: Triton or CUDA C++ on CUDA, and torch code that computes the same.

Triton is imported when one of its kernels is launched, so that everything else runs where it is not installed.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
import sysconfig
from pathlib import Path

import torch
from torch import Tensor

from varcli.errors import ConfigError, unknown_name

KERNELS = ("torch", "triton")
"""How a transformer is computed: by torch alone, or by the operators of this room, too."""


def is_triton_there() -> bool:
    """Say whether Triton is installed, and the C compiler and headers of Python that it builds its launchers with."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    # Debian's scheme in place of the usual one, as Triton takes it
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")
    header = Path(sysconfig.get_path("include", scheme)) / "Python.h"
    return importlib.util.find_spec("triton") is not None and bool(compiler) and header.is_file()


HAS_TRITON = is_triton_there()
"""What `is_triton_there` says of this process."""

_OLDEST_GPU = (8, 0)  # compute capability, of Triton's
_EARLY_LAUNCH = (9, 0)  # of programmatic dependent launch
_EARLY_LAUNCH_IN_GRAPHS = 12_030  # CUDA version of the driver


def resolve_kernels(name: str, device: torch.device) -> str:
    """Turn "auto" or one of KERNELS into one that is there: "auto" is triton on NVIDIA GPUs that it serves, else torch.

    Raises ConfigError for another name, and for triton where there is no NVIDIA GPU or no Triton.
    """
    is_nvidia = device.type == "cuda" and not torch.version.hip
    if name not in ("auto", *KERNELS):
        raise unknown_name("kernels", name, ["auto", *KERNELS])
    if name == "auto":
        is_served = is_nvidia and torch.cuda.get_device_capability(device) >= _OLDEST_GPU
        return "triton" if is_served and HAS_TRITON else "torch"
    if name == "triton" and not is_nvidia:
        found = "an AMD GPU" if device.type == "cuda" else device.type
        raise ConfigError(
            f"kernels `triton` need an NVIDIA GPU with CUDA, but the device is {found}", "`auto` takes what runs here"
        )
    if name == "triton" and not HAS_TRITON:
        raise ConfigError(
            "kernels `triton` were asked for, but Triton is not installed, or not the C compiler and Python headers it needs",
            "`auto` takes what runs here; on Debian and Ubuntu: apt install gcc python3-dev",
        )
    return name


def is_launched(x: Tensor) -> bool:
    """Whether a kernel for `x` is launched as it is: on a GPU, where nothing wants gradients and torch.compile is not at work.

    Else it must be an operator of torch's, whose first call imports torch's compiler, which takes more than a second.
    """
    return x.is_cuda and not torch.is_grad_enabled() and not torch.compiler.is_compiling()


def launches_early(device: torch.device) -> bool:
    """Whether a kernel on this GPU can begin before the one it follows has ended, in a graph too: see `few_rows_triton`."""
    if device.type != "cuda" or torch.version.hip or torch.cuda.get_device_capability(device) < _EARLY_LAUNCH:
        return False
    return _driver_version() >= _EARLY_LAUNCH_IN_GRAPHS


def _driver_version() -> int:
    """CUDA version of the NVIDIA driver, major * 1,000 + minor * 10, or 0 where its library is not found."""
    version = ctypes.c_int()
    try:
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except OSError:
        return 0
    return version.value
