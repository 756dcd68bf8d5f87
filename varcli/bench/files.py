"""How fast `varcli tokenize` goes from JPEG files to codes on disk, and its parts on their own."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from varcli.bench.calibrate import Ceiling, median_seconds
from varcli.bench.config import BenchConfig
from varcli.bench.counting import encoding_flops
from varcli.bench.pictures import write_photographs
from varcli.bench.result import Measurement
from varcli.data.defaults import default_decode
from varcli.data.images import ImageTree, open_images
from varcli.data.stream import decode_spans, default_workers
from varcli.devices import precision_name
from varcli.progress import OnStep, Step
from varcli.tokenizer import VQVAE
from varcli.tokenizer.batch_encoder import BatchEncoder
from varcli.tokenizer.encode import tokenize
from varcli.tokenizer.store import save_tokenizer

FILES = "tokenize-files"
"""The stage's name."""

_SIZE = (500, 400)  # pixels, as most photographs of ImageNet
# batches after the first; of fewer, two that come at once because both waited change the rate by a quarter
_STEADY_FROM = 8


def measure_files(
    size: int, config: BenchConfig, device: torch.device, dtype: torch.dtype, ceiling: Ceiling, on_step: OnStep
) -> list[Measurement]:
    """Time the real `tokenize` on made-up JPEG files with random weights, then decoding and the encoder alone.

    size: images of a batch. Files and codes lie in a temporary folder, some 90 kB an image. The first rate is that of the
    whole call; `steady_images_per_second` leaves out what comes before the first batch: imports, torch.compile, and the
    comparison with float32. It is None where the files are few (`steady_rate`). Random weights choose codes by smaller
    differences than trained ones, so they agree less.
    """
    workers = default_workers() if config.workers is None else config.workers
    torch.manual_seed(0)
    model = VQVAE(config.tokenizer).eval().requires_grad_(False)
    flops = encoding_flops(config.tokenizer)
    with tempfile.TemporaryDirectory(prefix="varcli-bench-") as temporary:
        folder = Path(temporary)
        on_step(Step(0, config.num_files, "images", message="drawing pictures"))
        write_photographs(folder / "images", config.num_files, _SIZE, max(1, workers), on_step)
        save_tokenizer(folder / "tokenizer", model)
        on_step(Step(0, None, "images", message="decoding alone"))
        tree = open_images(folder / "images")
        decoding = _time_decoding(tree, config.tokenizer.image_size, size, workers)
        on_step(Step(0, None, "images", message="the encoder alone"))
        encoding, is_compiled = _time_encoder(model.to(device), size, config, dtype)
        on_step(Step(0, None, "images", message="files to codes"))
        seconds, steady, agreement, peak = _time_command(folder, size, config, device, dtype, workers, is_compiled)
        file_kb = sum(path.stat().st_size for path in (folder / "images").rglob("*.jpg")) / config.num_files / 1e3
    details = {"files": config.num_files, "file_kb": file_kb, "file_size": list(_SIZE), "workers": workers}
    whole = {**details, "seconds": seconds, "steady_images_per_second": steady, "agreement": agreement}

    def entry(part: str, rate: float, work: float, peak_gib: float | None, details: dict) -> Measurement:
        return Measurement(
            stage=FILES + part,
            batch_size=size,
            milliseconds=size / rate * 1e3,
            images_per_second=rate,
            tflops=work * rate / 1e12,
            share_of_matmul=work * rate / 1e12 / ceiling.matmul_tflops,
            peak_gib=peak_gib,
            precision=precision_name(dtype),
            is_compiled=is_compiled,
            model=config.describe(FILES),
            details=details,
        )

    return [
        entry("", config.num_files / seconds, flops, peak, whole),
        entry(": decoding alone", decoding, 0.0, None, details),
        entry(": encoder alone", encoding, flops, None, {"repeats": config.repeats}),
    ]


def _time_decoding(tree: ImageTree, side: int, size: int, workers: int) -> float:
    """Images a second from files to pixels as the encoder gets them, the start of the processes counted in."""
    split = next(iter(tree.splits))
    decode, count = default_decode(tree, side)[split], len(tree.splits[split])
    start = time.perf_counter()
    with closing(decode_spans(tree, split, decode, [range(count)], 1, workers, size)) as stream:
        for _ in stream:
            pass
    return count / (time.perf_counter() - start)


def _time_encoder(model: VQVAE, size: int, config: BenchConfig, dtype: torch.dtype) -> tuple[float, bool]:
    """Images a second from pixels on the device to codes there, and whether torch.compile was at work."""
    encoder = BatchEncoder(model, dtype, size, config.compile)
    side = model.config.image_size
    images = torch.randint(0, 256, (size, 3, side, side), dtype=torch.uint8, device=encoder.device)
    seconds = median_seconds(lambda: encoder.encode(images), encoder.device, config.repeats)
    return size / seconds, encoder.is_compiled


def _time_command(
    folder: Path, size: int, config: BenchConfig, device: torch.device, dtype: torch.dtype, workers: int, compile: bool
) -> tuple[float, float | None, dict[str, Any] | None, float | None]:
    """Run `tokenize`. Returns seconds, images a second after the first batch, the agreement, and GPU memory in GiB."""
    moments: list[tuple[int, float]] = []

    def listen(step: Step) -> None:
        moments.extend([(step.done, time.perf_counter())] if step.done else [])

    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    start = time.perf_counter()
    result = tokenize(
        folder / "images",
        folder / "codes",
        folder / "tokenizer",
        batch_size=size,
        workers=workers,
        device=str(device),
        precision=precision_name(dtype),
        compile=compile,
        on_step=listen,
    )
    seconds = time.perf_counter() - start
    steady = steady_rate(moments)
    peak = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None
    return seconds, steady, result.agreement if result else None, peak


def steady_rate(moments: Sequence[tuple[int, float]]) -> float | None:
    """Return the images a second after the first batch; None where too few batches come after it for that to mean anything.

    moments: images done, and the time in seconds, after each batch.
    """
    if len(moments) <= _STEADY_FROM:
        return None
    (first, begun), (last, ended) = moments[0], moments[-1]
    return (last - first) / (ended - begun)
