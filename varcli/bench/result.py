"""What a benchmark measured, with everything that a later one needs in order to be compared with it."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from varcli import __version__
from varcli.bench.calibrate import Ceiling
from varcli.bench.profile import KernelTime


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One stage, or one part of it, at one batch size."""

    stage: str  # its name
    batch_size: int  # images at once, of each process
    milliseconds: float  # of a whole batch: the median, or where batches overlap the mean
    images_per_second: float  # batch size over that, of all processes together
    tflops: float  # of one process: 1e12 operations of the arithmetic a second; 0 where nothing is multiplied
    # of the rate of a large matrix product on the same device in the same run, which is never FP8's
    share_of_matmul: float
    peak_gib: float | None  # GPU memory of the first process; None elsewhere
    precision: str  # fp32, bf16 or fp16
    is_compiled: bool  # whether torch.compile was at work
    kernels: str | None = None  # train, and sample where it was asked for: torch or triton
    processes: int = 1  # that shared the work
    parallel: str | None = None  # how they did: ddp, fsdp or hsdp
    is_fp8: bool = False  # whether the blocks' large products were in FP8
    model: dict[str, Any] = field(default_factory=dict)  # what ran: its sizes
    details: dict[str, Any] = field(default_factory=dict)  # further numbers of this stage alone
    profile: tuple[KernelTime, ...] = ()  # where the time went, if that was asked for


@dataclass(frozen=True, kw_only=True)
class BenchResult:
    """The ceilings of the device, and what was reached."""

    ceiling: Ceiling
    measurements: tuple[Measurement, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    def records(self) -> list[dict[str, Any]]:
        """Return one flat record a measurement that says on its own what was measured where."""
        return [{**asdict(entry), **describe_run(self.ceiling)} for entry in self.measurements]


def describe_run(ceiling: Ceiling) -> dict[str, Any]:
    """Say what a measurement ran on: device, versions, and what the device can do."""
    return {
        "device": ceiling.device,
        "matmul_dtype": ceiling.dtype,
        "matmul_tflops": ceiling.matmul_tflops,
        "copy_gb_per_second": ceiling.copy_gb_per_second,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "varcli": __version__,
    }
