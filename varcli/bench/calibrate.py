"""What the device itself can do, measured in the same run as everything that is compared with it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from varcli.distributed import World
from varcli.distributed.context import exchange


@dataclass(frozen=True, kw_only=True)
class Ceiling:
    """Two measured limits of a device."""

    device: str  # its name
    dtype: str  # of the matrix product
    matmul_tflops: float  # 1e12 floating-point operations a second, multiply and add counted as two
    copy_gb_per_second: float  # 1e9 bytes a second, bytes read plus bytes written


def median_seconds(
    work: Callable[[], object], device: torch.device, repeats: int = 5, warmup: int = 2, in_a_row: int = 1
) -> float:
    """Median wall time of `work` in seconds, with the device idle before and after each run.

    in_a_row: calls a run, one after another as in a loop that never waits for the device; the time is that of one call.
    """
    for _ in range(warmup):
        work()
    times = []
    for _ in range(repeats):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(in_a_row):
            work()
        synchronize(device)
        times.append((time.perf_counter() - start) / in_a_row)
    return statistics.median(times)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def device_name(device: torch.device) -> str:
    """Name of the device, as a person would say it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({torch.get_num_threads()} threads)"


def measure_matmul(device: torch.device, dtype: torch.dtype) -> float:
    """Time a large matrix product of random data, 8192^3 on a GPU and 2048^3 elsewhere. Returns TFLOP/s, of 1e12."""
    on_gpu = device.type == "cuda"
    side = 8192 if on_gpu else 2048
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    seconds = median_seconds(lambda: a @ b, device, repeats=20 if on_gpu else 3, warmup=5 if on_gpu else 1)
    return 2 * side**3 / seconds / 1e12


def measure_ceiling(device: torch.device, dtype: torch.dtype) -> Ceiling:
    """Time a large matrix product and a large copy, of 1 GiB on a GPU and 256 MiB elsewhere."""
    matmul_tflops = measure_matmul(device, dtype)
    source = torch.empty(2**30 if device.type == "cuda" else 2**28, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    copy_seconds = median_seconds(lambda: target.copy_(source), device, repeats=20)
    return Ceiling(
        device=device_name(device),
        dtype=str(dtype).removeprefix("torch."),
        matmul_tflops=matmul_tflops,
        copy_gb_per_second=2 * source.numel() / copy_seconds / 1e9,
    )


def measure_exchange(world: World, device: torch.device) -> float:
    """Time a sum over all processes of 256 MiB in each, 16 MiB on a CPU. Returns 1e9 bytes of it a second.

    Every process must call it.
    """
    own = torch.zeros(2**26 if device.type == "cuda" else 2**22, device=device)
    with exchange():
        seconds = median_seconds(lambda: dist.all_reduce(own), device, repeats=10)
    return own.nbytes / slowest(seconds, world) / 1e9


def slowest(seconds: float, world: World) -> float:
    """Return the longest of all processes' times; every process must call it."""
    return world.gather(torch.tensor([seconds])).max().item()
