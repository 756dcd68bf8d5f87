"""Which device and which precision a command computes on."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch

from varcli.errors import ConfigError, VarcliError, is_out_of_memory, unknown_name, with_causes

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_device(name: str = "auto") -> torch.device:
    """Turn "auto", "cpu", "cuda", "cuda:1" or "mps" into a device that is there.

    "auto" takes CUDA, then MPS, then the CPU. Raises ConfigError if the device asked for is missing.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise unknown_name("device", name, ["auto", "cpu", "cuda", "mps"]) from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device `cuda` was asked for, but torch sees no CUDA GPU", "use --device cpu or auto")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device `{name}` was asked for, but there are {torch.cuda.device_count()} CUDA GPUs")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ConfigError("device `mps` was asked for, but torch sees no Apple GPU", "use --device cpu or auto")
    if device.type not in ("cpu", "cuda", "mps"):
        raise unknown_name("device", name, ["auto", "cpu", "cuda", "mps"])
    return device


def resolve_precision(name: str, device: torch.device) -> torch.dtype:
    """Turn "auto", "fp32", "bf16" or "fp16" into a dtype; "auto" is bf16 on CUDA and fp32 elsewhere."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if name not in PRECISIONS:
        raise unknown_name("precision", name, ["auto", *PRECISIONS])
    return PRECISIONS[name]


def precision_name(dtype: torch.dtype) -> str:
    """The name that `resolve_precision` turns into `dtype`."""
    return next(name for name, known in PRECISIONS.items() if known == dtype)


def exact_convolutions() -> contextlib.AbstractContextManager:
    """Let cuDNN neither round to TF32, which is its default, nor choose kernels by trying them out."""
    return torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)


def float64_or_best(device: torch.device) -> torch.dtype:
    """float64, or float32 on MPS, which has nothing wider."""
    return torch.float32 if device.type == "mps" else torch.float64


def autocast(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager:
    """Autocast to `dtype` on `device`; for float32 a context that does nothing."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=dtype)


def try_compiled(
    work: Callable[[], object], uncompile: Callable[[], object], tell: Callable[[str], object], *, is_optional: bool
) -> bool:
    """Do `work`, of which torch.compile made a part; if it fails, do it once more after `uncompile`, and tell why.

    Compilers fail with errors of every class: Triton's and those of its worker processes are no RuntimeErrors. A fault of
    `work` itself comes again without them.
    is_optional: False where torch.compile was asked for, whose error is raised then. So are VarcliError and running out of
    memory. Returns whether the compiled part works.
    """
    try:
        work()
        return True
    except Exception as error:
        if not is_optional or is_out_of_memory(error) or isinstance(error, VarcliError):
            raise
        reason = _reason(error)
    # not within the except clause, where the error still holds on to what the failed try has in memory
    uncompile()
    tell(f"going without torch.compile: {reason}")
    work()
    return False


def _reason(error: BaseException) -> str:
    """Say in one line what went wrong at first; a line that ends in a colon only announces what comes last."""
    *_, first = with_causes(error)
    lines = [line.strip() for line in str(first).splitlines() if line.strip()] or [type(first).__name__]
    line = lines[-1] if lines[0].endswith(":") else lines[0]
    return line if type(first) is RuntimeError else f"{type(first).__name__}: {line}"
