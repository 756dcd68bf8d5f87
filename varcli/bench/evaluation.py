"""How long `varcli eval` takes and how much memory, on made-up pictures and random weights: neither changes its speed."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from varcli.artifacts.write import write_tensors
from varcli.bench.calibrate import Ceiling, measure_ceiling, median_seconds
from varcli.bench.pictures import write_pictures
from varcli.bench.result import describe_run
from varcli.data.pool import default_workers
from varcli.data.samples import write_npz
from varcli.devices import resolve_device
from varcli.errors import ConfigError, VarcliError
from varcli.metrics.base import FeatureSet
from varcli.metrics.compute import METRICS
from varcli.metrics.features import GPU_BATCH
from varcli.metrics.inception import InceptionExtractor
from varcli.metrics.npz import SPATIAL_KEYS, STATISTICS_KEYS
from varcli.metrics.sources import from_folder
from varcli.progress import OnStep, Step, ignore

_NUM_FEATURES, _NUM_SPATIAL, _NUM_LOGITS = 2048, 2023, 1008
_POLL_SECONDS = 0.25


@dataclass(frozen=True, kw_only=True)
class EvalBenchConfig:
    """What is evaluated. The defaults are the size of published results."""

    count: int = 50_000  # samples, as PNG files
    reference_count: int = 10_000  # images of the reference, in an npz file beside statistics
    side: int = 256  # pixels
    workers: int | None = None  # processes that decode; None takes one a core, at most 16
    device: str = "auto"  # auto, cpu, cuda or mps

    def __post_init__(self) -> None:
        if min(self.count, self.reference_count) < 256 or self.side < 32:
            raise ConfigError("an evaluation worth timing has 256 images or more in both sets, of 32 px or more")


@dataclass(frozen=True, kw_only=True)
class Part:
    """One timed part. The first two are whole commands, the others parts of them on their own."""

    name: str
    seconds: float
    images: int  # what the seconds were for
    peak_gpu_gib: float | None = None  # memory on the GPU; None elsewhere, or where another process used it
    # memory of the command and its workers, pages that they share once; None unless on Linux
    peak_host_gib: float | None = None
    mapped_gib: float | None = None  # of it pages of files, which the system takes back when it needs them


@dataclass(frozen=True, kw_only=True)
class EvalBenchResult:
    """What was measured."""

    ceiling: Ceiling  # of the device in float32, as the network computes
    count: int  # samples
    file_kb: float  # mean size of a sample on disk, 1e3 bytes
    workers: int  # processes that decode
    parts: tuple[Part, ...]
    network_tflops: float  # 1e12 operations a second of the network alone

    def record(self) -> dict[str, Any]:
        """Return one record that says on its own what was measured where."""
        values = {name: value for name, value in asdict(self).items() if name != "ceiling"}
        return {"stage": "eval", "precision": "fp32", **values, **describe_run(self.ceiling)}


def bench_evaluation(config: EvalBenchConfig | None = None, on_step: OnStep = ignore) -> EvalBenchResult:
    """Time `varcli eval` as a command, first with nothing kept and then with kept features, and each of its parts.

    Everything is written to a temporary folder: some 120 kB a picture, 200 kB an image of the reference. Raises
    VarcliError with the command's own words if it fails.
    """
    config = config or EvalBenchConfig()
    device = resolve_device(config.device)
    workers = default_workers() if config.workers is None else config.workers
    with tempfile.TemporaryDirectory(prefix="varcli-bench-") as temporary:
        folder = Path(temporary)
        samples, reference, weights = folder / "samples", folder / "reference.npz", folder / "weights.safetensors"
        on_step(Step(0, config.count, "images", message="drawing pictures"))
        write_pictures(samples, config.count, config.side, workers, on_step)
        _write_reference(reference, config)
        _write_weights(weights)
        command = ["eval", str(samples), "--ref", str(reference), "--device", str(device), "--json"]
        command += ["--inception-weights", str(weights), "--allow-unknown-weights", "--cache", str(folder / "kept")]
        command += ["--workers", str(workers)]
        parts = []
        for name in ("the command, nothing kept", "the command, features kept"):
            on_step(Step(0, None, "images", message=name))
            parts.append(_run(name, command, config.count))
        on_step(Step(0, None, "images", message="parts"))
        ceiling = measure_ceiling(device, torch.float32)
        extractor = InceptionExtractor(weights, device, allow_unknown=True)
        parts += _reading_parts(samples, workers)
        network, tflops = _network_part(extractor, config)
        parts += [network, *_metric_parts(config, device)]
        return EvalBenchResult(
            ceiling=ceiling,
            count=config.count,
            file_kb=sum(path.stat().st_size for path in samples.iterdir()) / config.count / 1e3,
            workers=workers,
            parts=tuple(parts),
            network_tflops=tflops,
        )


def _write_reference(path: Path, config: EvalBenchConfig) -> None:
    count = min(config.reference_count, config.count)
    arrays = {
        STATISTICS_KEYS[0]: np.zeros(_NUM_FEATURES),
        STATISTICS_KEYS[1]: np.eye(_NUM_FEATURES),
        SPATIAL_KEYS[0]: np.zeros(_NUM_SPATIAL),
        SPATIAL_KEYS[1]: np.eye(_NUM_SPATIAL),
    }
    random = np.random.default_rng(0)
    noise = (random.integers(0, 256, (3, config.side, config.side), np.uint8) for _ in range(count))
    write_npz(path, noise, count, config.side, arrays)


def _write_weights(path: Path) -> None:
    from varcli.metrics.inception_network import InceptionNetwork

    torch.manual_seed(0)
    network = InceptionNetwork()
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)  # keeps the size of activations; others run into denormal numbers
    write_tensors(path, network.state_dict())


def _run(name: str, arguments: list[str], images: int) -> Part:
    """Run a varcli command, and look at the memory of its processes while it runs."""
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "varcli", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    peak = (0.0, 0.0)

    def watch() -> None:
        nonlocal peak
        while process.poll() is None:
            peak = max(peak, _tree_memory(process.pid))
            time.sleep(_POLL_SECONDS)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    _, errors = process.communicate()
    seconds = time.perf_counter() - start
    watcher.join()
    if process.returncode:
        raise VarcliError(f"`varcli {' '.join(arguments)}` failed: {errors.strip()}")
    return Part(name=name, seconds=seconds, images=images, peak_host_gib=peak[0] or None, mapped_gib=peak[1] or None)


def _tree_memory(pid: int) -> tuple[float, float]:
    """Return the memory of a process and its children in GiB, and how much of it is pages of files, as mapped features are.

    Pages that several share count once. Zeros unless on Linux.
    """
    total = mapped = 0
    try:
        tasks = Path(f"/proc/{pid}/task")
        children = [child for task in tasks.iterdir() for child in (task / "children").read_text().split()]
        for number in (pid, *children):
            for line in Path(f"/proc/{number}/smaps_rollup").read_text().splitlines():
                total += int(line.split()[1]) if line.startswith("Pss:") else 0
                mapped += int(line.split()[1]) if line.startswith("Pss_File:") else 0
    except OSError:  # no Linux, or a process just ended
        return 0.0, 0.0
    return total / 2**20, mapped / 2**20


def _reading_parts(samples: Path, workers: int) -> list[Part]:
    """Time what needs no network: listing and hashing the files, and decoding them."""
    source, seconds = _timed(lambda: from_folder(samples))
    hashing = _timed(source.digest)[1] if source.digest else 0.0
    _, decoding = _timed(lambda: sum(len(batch) for batch in source.batches(GPU_BATCH, workers=workers)))
    return [
        Part(name="listing and hashing the files", seconds=seconds + hashing, images=source.count),
        Part(name="decoding alone", seconds=decoding, images=source.count),
    ]


def _network_part(extractor: InceptionExtractor, config: EvalBenchConfig) -> tuple[Part, float]:
    """Time the network on images in memory; return 1e12 operations a second too."""
    batch = GPU_BATCH if extractor.device.type == "cuda" else extractor.batch_size
    images = torch.randint(0, 256, (batch, 3, config.side, config.side), dtype=torch.uint8).to(extractor.device)
    with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, benchmark=False, allow_tf32=False):
        with FlopCounterMode(display=False) as counter:
            extractor.extract(images, spatial=True)
        _start_peak(extractor.device)
        seconds = median_seconds(lambda: extractor.extract(images, spatial=True), extractor.device)
    part = Part(
        name="the network alone",
        seconds=seconds * config.count / batch,
        images=config.count,
        peak_gpu_gib=_peak_gib(extractor.device),
    )
    return part, counter.get_total_flops() / seconds / 1e12


def _metric_parts(config: EvalBenchConfig, device: torch.device) -> list[Part]:
    """Time each metric on random features."""
    random = np.random.default_rng(0)

    def draw(count: int) -> FeatureSet:
        columns = (_NUM_FEATURES, _NUM_SPATIAL, _NUM_LOGITS)
        features, spatial, logits = (random.standard_normal((count, width), np.float32) for width in columns)
        return FeatureSet(features=features, spatial=spatial, logits=logits)

    samples, reference = draw(config.count), draw(min(config.reference_count, config.count))
    parts = []
    for metric in dict.fromkeys(METRICS.values()):
        _start_peak(device)
        _, seconds = _timed(lambda metric=metric: metric.compute(samples, reference, device))
        parts.append(
            Part(name=", ".join(metric.keys), seconds=seconds, images=config.count, peak_gpu_gib=_peak_gib(device))
        )
    return parts


def _timed(work: Callable[[], object]) -> tuple:
    start = time.perf_counter()
    result = work()
    return result, time.perf_counter() - start


def _start_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def _peak_gib(device: torch.device) -> float | None:
    return torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None
