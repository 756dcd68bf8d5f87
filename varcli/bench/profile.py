"""Where the time of a measurement goes: a device's kernels by name and kind, from torch's profiler."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from varcli.bench.calibrate import synchronize

_RUNS = 2  # profiled, after those that were timed

_KINDS = (
    ("fused by torch.compile", r"^triton_(?!tem_)|^cpp_fused"),  # their names hold those of what was fused
    ("attention", r"flash|fmha|sdpa|scaled_dot_product|flex_attention|softmax_(forward|backward)_"),
    ("convolution", r"conv|fprop|dgrad|wgrad|implicit"),
    (
        "matrix product",
        r"gemm|gemv|triton_tem_|nvjet|cublas|cutlass|splitkreduce|^aten::(mm|addmm|bmm|baddbmm|_scaled_mm|dot|mv)$",
    ),
    ("varcli's own", r"^_?varcli|_draw_"),
    ("optimizer", r"multi_tensor|adam|foreach|lpnorm"),
    ("copy", r"memcpy|memset|copy|catarray|^aten::(cat|fill_|zero_|_to_copy)$"),
    ("reduction", r"reduce|norm|softmax|logsumexp|argmax|topk|sort|scan|^aten::(sum|mean|amax)$"),
    ("element-wise", r"elementwise|pointwise|index|gather|scatter|embedding|random|upsample|^aten::"),
)
"""Kinds of kernels, and what their lower-case names look like; the first that fits counts."""


@dataclass(frozen=True, kw_only=True)
class KernelTime:
    """All launches of one kernel in a batch; on a CPU, all calls of one operator without what it calls."""

    name: str
    kind: str  # a name of _KINDS, or "other"
    milliseconds: float  # a batch
    count: float  # launches a batch
    share: float  # of all kernels' time


def profile_kernels(work: Callable[[], object], device: torch.device) -> tuple[KernelTime, ...]:
    """Run `work`, a whole batch, under the profiler and return its kernels, those that take longest first.

    Kernels that run side by side count with their own time each. On a device that torch cannot profile, its operators on
    the CPU are returned.
    """
    activity = torch.profiler.ProfilerActivity
    on_cuda = device.type == "cuda"
    synchronize(device)
    with torch.profiler.profile(activities=[activity.CUDA if on_cuda else activity.CPU]) as profiler:
        for _ in range(_RUNS):
            work()
        synchronize(device)
    wanted = torch.autograd.DeviceType.CUDA if on_cuda else torch.autograd.DeviceType.CPU
    times: dict[str, tuple[float, int]] = {}
    for entry in profiler.key_averages():
        microseconds = entry.self_device_time_total if on_cuda else entry.self_cpu_time_total
        # annotations span the kernels below them, which would count twice
        if entry.device_type == wanted and not getattr(entry, "is_user_annotation", False) and microseconds > 0:
            before = times.get(entry.key, (0.0, 0))
            times[entry.key] = (before[0] + microseconds, before[1] + entry.count)
    total = sum(microseconds for microseconds, _ in times.values())
    kernels = [
        KernelTime(
            name=name,
            kind=kind_of(name),
            milliseconds=microseconds / _RUNS / 1e3,
            count=count / _RUNS,
            share=microseconds / total,
        )
        for name, (microseconds, count) in times.items()
    ]
    return tuple(sorted(kernels, key=lambda kernel: -kernel.milliseconds))


def kind_of(name: str) -> str:
    """Return what kind of kernel a name tells of."""
    return next((kind for kind, pattern in _KINDS if re.search(pattern, name.lower())), "other")


def by_kind(kernels: Iterable[KernelTime]) -> dict[str, tuple[float, float]]:
    """Return milliseconds and launches of each kind, those that take longest first."""
    sums: dict[str, tuple[float, float]] = {}
    for kernel in kernels:
        milliseconds, count = sums.get(kernel.kind, (0.0, 0.0))
        sums[kernel.kind] = (milliseconds + kernel.milliseconds, count + kernel.count)
    return dict(sorted(sums.items(), key=lambda item: -item[1][0]))
