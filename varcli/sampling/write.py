"""A folder of generated images: the core of `varcli sample`."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from varcli import config as configs
from varcli.data.samples import GRID_NAME, SamplesWriter, sample_class, write_sample
from varcli.distributed import ALONE, World
from varcli.progress import OnStep, Step, ignore
from varcli.sampling.generator import Generator
from varcli.sampling.settings import SampleConfig


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
    on_step: OnStep = ignore,
    world: World = ALONE,
) -> SampleResult:
    """Draw images into `out`, as PNGs with a grid and a manifest; a rerun draws only what is missing.

    wanted: (class index, index within the class) of each image. model: how the model is called, for the manifest, which
    also names the images the model learned from: `varcli eval` measures against them. npz: also write the array that
    evaluation suites read. world: processes that share the images and all call this, each with a generator on a device of
    its own; the images are those of one process.
    Raises ConfigError if `out` holds samples made with other settings, ArtifactError if it cannot be written.
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
    size = batch_size or generator.batch_size(config)
    with ExitStack() as stack:
        writer = stack.enter_context(SamplesWriter(out, settings)) if world.is_first else None
        missing = _tell_missing(writer, wanted, world)
        own = world.share(missing)
        for start in range(0, len(own), size):
            batch = own[start : start + size]
            classes, indices = zip(*batch, strict=True)
            images = generator.sample(classes, indices, config, batch_size=batch_size)
            for (class_index, index), image in zip(batch, images, strict=True):
                write_sample(out, class_index, index, image)
            on_step(Step(min(world.size * (start + len(batch)), len(missing)), len(missing), unit="images"))
        world.wait()
        num_images = len(wanted)
        if writer is not None:
            writer.add(missing)
            manifest = writer.finish(wanted, info, columns=columns, npz=npz)
            num_images = sum(sample_class(name) is not None for name in manifest.files)
    return SampleResult(folder=Path(out), grid=Path(out) / GRID_NAME, num_images=num_images, num_drawn=len(missing))


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
