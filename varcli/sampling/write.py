"""A folder of generated images: the core of `varcli sample`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from varcli import config as configs
from varcli.data.parts import NpzWriter, PartsSaver
from varcli.data.pool import default_workers
from varcli.data.samples import GRID_NAME, SamplesWriter, sample_name
from varcli.data.saver import ImageSaver
from varcli.distributed import ALONE, World
from varcli.progress import OnStep, Step, ignore
from varcli.sampling.generator import Generator
from varcli.sampling.reject import SCORES_NAME, Judge, Pair, Rejection, ScoreBook
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
    npz_only: bool = False,
    workers: int | None = None,
    rejection: Rejection | None = None,
    on_step: OnStep = ignore,
    world: World = ALONE,
) -> SampleResult:
    """Draw images into `out`, as PNGs with a grid and a manifest; a rerun draws only what is missing.

    wanted: (class index, index within the class) of each image. model: how the model is called, for the manifest, which
    also names the images the model learned from: `varcli eval` measures against them. npz: also write the array that
    evaluation suites read; npz_only: that alone, and no PNG files. workers: processes that encode and write PNGs while the
    next batch is drawn; 0 does it here, None chooses. rejection: draw more candidates and keep the best, so that the images
    of a class are not numbered in a row any more; the scores of all candidates stay in the folder. world: processes that
    share the images and all call this, each with a generator on a device of its own; the images are those of one process,
    on a CPU byte for byte where each has as many threads and `smooth` is off.
    Raises ConfigError if `out` holds samples made with other settings or nothing can judge candidates, ArtifactError if it
    cannot be written, DataError if a worker is killed; what was finished is kept.
    """
    config = config or SampleConfig()
    precision = str(generator.dtype(config)).removeprefix("torch.")
    settings = {**configs.to_dict(config), "precision": precision, "tokenizer": generator.tokenizer_fingerprint}
    settings |= {"transformer": generator.weights_sha256, "classes": list(generator.classes.names)}
    settings["fp8"] = generator.transformer.is_kept_in_fp8 or None
    settings |= {"reject": None if rejection is None else str(rejection), "files": "npz" if npz_only else None}
    info = {
        "model": model,  # no setting: weights draw the same images under another name
        "image_size": generator.tokenizer.config.image_size,
        "guidance": "(1 + t) * cond - t * uncond",
        **({"reference": generator.source} if generator.source else {}),
    }
    with ExitStack() as stack:
        if rejection is not None and world.is_first and not Path(out).exists():
            from varcli.sampling.scorer import require_images

            require_images(generator.classes, generator.source)
        kind = NpzWriter if npz_only else SamplesWriter
        writer = stack.enter_context(kind(out, settings)) if world.is_first else None
        job = _Job(generator, Path(out), config, batch_size, workers, npz_only, on_step, world)
        num_drawn, extra = 0, []
        if rejection is not None:
            wanted, num_drawn, book = job.judge(wanted, rejection)
            info["scorer"] = book.scorer
            extra = [SCORES_NAME]
            if writer is not None:
                writer.add(wanted)
        missing = _tell_missing(writer, wanted, world)
        with job.open_saver(len(missing)) as saver:
            job.draw(world.share(missing), len(missing), saver.save)
        world.wait()
        num_images = len(wanted)
        if writer is not None:
            writer.add(missing)
            if rejection is not None:
                book.finish()
            writer.finish(wanted, info, columns=columns, npz=npz, extra=extra)
            num_images = writer.num_images
    num_drawn += len(missing)
    return SampleResult(folder=Path(out), grid=Path(out) / GRID_NAME, num_images=num_images, num_drawn=num_drawn)


@dataclass(frozen=True)
class _Job:
    """What one process of a world draws with, and where to."""

    generator: Generator
    out: Path
    config: SampleConfig
    batch_size: int | None
    workers: int | None
    npz_only: bool
    on_step: OnStep
    world: World

    def open_saver(self, count: int) -> PartsSaver | _PngSaver:
        """Return what saves this process's share of `count` images.

        No processes encode where a CPU draws, which takes far longer, or for a few images.
        """
        if self.npz_only:
            return PartsSaver(self.out)
        if self.workers is not None:
            return _PngSaver(self.out, self.workers)
        is_worth_it = self.generator.device.type != "cpu" and count >= _WORKERS_FROM * self.world.size
        return _PngSaver(self.out, min(default_workers(), _MAX_WORKERS) if is_worth_it else 0)

    def draw(self, pairs: Sequence[Pair], total: int, take: Callable[[Sequence[Pair], Tensor], None]) -> None:
        """Draw the (class, index) of this process, and hand over each batch; `total` is what all processes draw."""
        if not pairs:
            return
        done, (classes, indices) = 0, zip(*pairs, strict=True)
        for images in self.generator.batches(classes, indices, self.config, self.batch_size):
            take(pairs[done : done + len(images)], images)
            done += len(images)
            self.on_step(Step(min(self.world.size * done, total), total, unit="images"))

    def judge(self, wanted: Sequence[Pair], rejection: Rejection) -> tuple[list[Pair], int, ScoreBook]:
        """Draw the candidates that have no score yet, and save what wins among them.

        Returns the winners, which may be on disk or not, how many candidates all processes drew, and the scores.
        """
        world, book = self.world, ScoreBook(self.out, self.world.rank)
        book.read()
        groups = rejection.groups(wanted)
        lacking = {
            group: ranks
            for group, ranks in groups.items()
            if not all(pair in book.scores for pair in rejection.candidates(group))
        }
        world.wait()  # all have read before one writes
        (is_needed,) = world.largest(len(lacking))
        if is_needed:
            from varcli.sampling.scorer import make_scorer

            generator = self.generator
            side = generator.tokenizer.config.image_size
            scorer = make_scorer(generator.classes, generator.source, side, generator.device, world, self.on_step)
            if world.is_first:
                book.describe({"name": scorer.name, "accuracy": scorer.accuracy})
            own = dict(world.share(list(lacking.items())))
            total = sum(pair not in book.scores for group in lacking for pair in rejection.candidates(group))
            with self.open_saver(len(lacking)) as saver:
                judge = Judge(rejection, own, scorer, book, saver.save)
                self.draw(judge.missing(), total, judge)
            world.wait()
            book.read()
        winners = [pair for group, ranks in groups.items() for pair in rejection.winners(group, ranks, book.scores)]
        return winners, total if is_needed else 0, book


class _PngSaver(ImageSaver):
    """Saves samples under their names."""

    def save(self, pairs: Sequence[Pair], images: Tensor) -> None:
        super().save([sample_name(*pair) for pair in pairs], images)


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
