"""A folder of generated images: the core of `varcli sample`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from varcli import config as configs
from varcli.data.pool import default_workers
from varcli.data.samples import GRID_NAME, SamplesWriter, sample_class, sample_name
from varcli.data.saver import ImageSaver
from varcli.distributed import ALONE, World
from varcli.progress import OnStep, Step, ignore
from varcli.sampling.generator import Generator
from varcli.sampling.settings import SampleConfig

_WORKERS_FROM = 64  # images; below it, starting processes takes longer than encoding
_MAX_WORKERS = 8  # a 256 px image takes one of them 7 ms: together they encode 1,100 a second


@dataclass(frozen=True, kw_only=True)
class SampleResult:
    """What was written."""

    folder: Path
    grid: Path
    num_images: int  # in the folder
    num_drawn: int  # of them by this call; the others were there


def sample_to_folder(
    generator: Generator,
    wanted: Sequence[tuple[int, int]],
    out: Path,
    config: SampleConfig | None = None,
    *,
    model: str = "",
    batch_size: int | None = None,
    columns: int | None = None,
    npz: bool = False,
    workers: int | None = None,
    on_step: OnStep = ignore,
    world: World = ALONE,
) -> SampleResult:
    """Draw images into `out`, as PNGs with a grid and a manifest; a rerun draws only what is missing.

    wanted: (class index, index within the class) of each image. model: how the model is called, for the manifest, which
    also names the images the model learned from: `varcli eval` measures against them. npz: also write the array that
    evaluation suites read. workers: processes that encode and write PNGs while the next batch is drawn; 0 does it here, None
    chooses. world: processes that share the images and all call this, each with a generator on a device of its own; the
    images are those of one process, on a CPU byte for byte.
    Raises ConfigError if `out` holds samples made with other settings, ArtifactError if it cannot be written, DataError if
    a worker is killed; what was finished is kept.
    """
    config = config or SampleConfig()
    precision = str(generator.dtype(config)).removeprefix("torch.")
    settings = {**configs.to_dict(config), "precision": precision, "tokenizer": generator.tokenizer.fingerprint()}
    settings |= {"transformer": generator.weights_sha256, "model": model, "classes": list(generator.classes.names)}
    info = {
        "image_size": generator.tokenizer.config.image_size,
        "guidance": "(1 + t) * cond - t * uncond",
        **({"reference": generator.source} if generator.source else {}),
    }
    with ExitStack() as stack:
        writer = stack.enter_context(SamplesWriter(out, settings)) if world.is_first else None
        missing = _tell_missing(writer, wanted, world)
        own = world.share(missing)
        if workers is None:
            workers = _choose_workers(generator, len(own))
        with ImageSaver(out, workers) as saver:
            done = 0
            for images in _batches(generator, own, config, batch_size):
                saver.save([sample_name(*pair) for pair in own[done : done + len(images)]], images)
                done += len(images)
                on_step(Step(min(world.size * done, len(missing)), len(missing), unit="images"))
        world.wait()
        num_images = len(wanted)
        if writer is not None:
            writer.add(missing)
            manifest = writer.finish(wanted, info, columns=columns, npz=npz)
            num_images = sum(sample_class(name) is not None for name in manifest.files)
    return SampleResult(folder=Path(out), grid=Path(out) / GRID_NAME, num_images=num_images, num_drawn=len(missing))


def _batches(
    generator: Generator, pairs: Sequence[tuple[int, int]], config: SampleConfig, batch_size: int | None
) -> Iterator[Tensor]:
    if pairs:
        classes, indices = zip(*pairs, strict=True)
        yield from generator.batches(classes, indices, config, batch_size)


def _choose_workers(generator: Generator, count: int) -> int:
    """Return how many processes encode: none where a CPU draws, which takes far longer, or for a few images."""
    return 0 if generator.device.type == "cpu" or count < _WORKERS_FROM else min(default_workers(), _MAX_WORKERS)


def _tell_missing(
    writer: SamplesWriter | None, wanted: Sequence[tuple[int, int]], world: World
) -> list[tuple[int, int]]:
    """Return what the first process, which has the writer, finds missing."""
    missing = writer.missing(wanted) if writer is not None else []
    pairs = torch.zeros(world.largest(len(missing))[0], 2, dtype=torch.int64)
    if missing:
        pairs = torch.tensor(missing)
    world.copy_first(pairs)
    return [(class_index, index) for class_index, index in pairs.tolist()]
