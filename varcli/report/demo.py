"""The demo: emoji64 from images to measured pictures, in a few minutes on two CPU cores.

Two models draw: one that is trained here, from nothing, for a minute or two, and the one that comes with varcli. Both
are measured as `varcli eval` does it, beside real images in their place.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import monotonic

import numpy as np
import torch
from PIL import Image

from varcli.artifacts.verify import read_json
from varcli.data.codes import CodesCache
from varcli.data.emoji import unpack_emoji64
from varcli.data.images import open_images
from varcli.data.png import save_png
from varcli.data.samples import make_grid, read_images, sample_name
from varcli.devices import resolve_device
from varcli.errors import ConfigError
from varcli.metrics.compute import larger_is_better
from varcli.metrics.evaluate import EvalConfig, EvalResult, evaluate
from varcli.progress import OnStep, ignore
from varcli.sampling.generator import Generator, SampleConfig
from varcli.sampling.models import find_model
from varcli.sampling.write import SampleResult, sample_to_folder
from varcli.scales import PatchNums
from varcli.tokenizer.encode import tokenize
from varcli.training import TrainConfig, TrainResult, train_transformer
from varcli.training.plan import time_once
from varcli.training.run import CONFIG_NAME
from varcli.transformer import Transformer

MODEL = "emoji64"  # the model that comes with varcli
NUM_STAGES = 7
_BATCH_SIZE = 16  # images a training step: with a minute to learn in, many small steps beat few large ones
_DRAW_BATCH = 64  # images drawn at a time, so that the bar moves
_MIN_STEPS, _MAX_STEPS = 20, 3000
_TIMED_STEPS = 4
_COMPARED, _GAP = 5, 24  # images of a class side by side, and pixels between the blocks


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """How long the demo trains and how much it draws."""

    minutes: float = 1.5  # of training, timed by a few steps beforehand
    steps: int | None = None  # of training, in place of minutes
    per_class: int = 32  # images each model draws of each class
    device: str = "auto"  # as in `varcli.devices.resolve_device`
    seed: int = 0  # of training and drawing

    def __post_init__(self) -> None:
        if not self.minutes > 0:
            raise ConfigError(f"minutes must be above 0, but is {self.minutes:g}", "1.5 is enough to see something")
        for name, count in (("steps", self.steps), ("per_class", self.per_class)):
            if count is not None and count < 1:
                raise ConfigError(f"{name} must be at least 1, but is {count}")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A stage that is about to run."""

    number: int  # from 1 to NUM_STAGES
    title: str  # for people
    command: str  # what does the same by hand


OnStage = Callable[[Stage], OnStep]
"""Told of each stage before it runs; what it returns hears how far the stage is."""


@dataclass(frozen=True, kw_only=True)
class DemoResult:
    """Where the pictures are and what was measured."""

    folder: Path
    training: TrainResult  # of the model trained here
    comparison: Path  # picture, a row a class: images of the model trained here, of varcli's, and real ones
    pictures: dict[str, Path]  # model -> its grid
    metrics: dict[str, dict[str, float]]  # model, or "real images" -> metric -> number
    better: dict[str, str]  # metric -> "lower" or "higher"
    warnings: tuple[str, ...]  # what a reader of the numbers must know
    seconds: dict[str, float] = field(default_factory=dict)  # stage -> time taken; little where a rerun found it done


def _say_nothing(_: Stage) -> OnStep:
    return ignore


def run_demo(out: Path, config: DemoConfig | None = None, on_stage: OnStage = _say_nothing) -> DemoResult:
    """Unpack emoji64, tokenize it, train on it, draw from two models, and measure both.

    out: folder for everything; a rerun goes on where the last one stopped and repeats nothing but the measuring.
    Raises what the stages raise; ConfigError if `out` was begun with another seed or more steps.
    """
    return _Demo(Path(out), config or DemoConfig(), on_stage).run()


class _Demo:
    """One run of the demo."""

    def __init__(self, out: Path, config: DemoConfig, on_stage: OnStage) -> None:
        self.out, self.config, self.on_stage = out, config, on_stage
        self.images, self.codes, self.trained = out / "emoji64", out / "codes", out / "trained"
        self.seconds: dict[str, float] = {}

    def run(self) -> DemoResult:
        device = self.config.device
        with self._stage("unpack the images", "data", "emoji64", "--out", self.images):
            unpack_emoji64(self.images)
        words = ("tokenize", self.images, "--out", self.codes, "--tokenizer", MODEL)
        with self._stage("turn images into codes", *words) as on_step:
            tokenize(self.images, self.codes, MODEL, device=device, on_step=on_step)
        training = self._train()
        pictures = {name: self._draw(name, source) for name, source in self._models().items()}
        results = {name: self._measure(name) for name in self._models()}
        metrics = {name: result.metrics for name, result in results.items()}
        last = results[MODEL]
        metrics["real images"] = last.floor
        return DemoResult(
            folder=self.out,
            training=training,
            comparison=self._compare(),
            pictures={name: result.grid for name, result in pictures.items()},
            metrics=metrics,
            better={
                name: "higher" if larger_is_better(name, last.features["network"]) else "lower" for name in last.metrics
            },
            warnings=last.warnings,
            seconds=self.seconds,
        )

    def _models(self) -> dict[str, Path | str]:
        return {"trained": self.trained, MODEL: MODEL}

    def _train(self) -> TrainResult:
        settings = self._training_config()
        words = ["train", self.codes, "--out", self.trained, "--depth", settings.depth, "--steps", settings.steps]
        words += ["--batch-size", settings.batch_size, "--seed", settings.seed]
        words += ["--set", f"width={settings.width}", "--set", f"validate_every={settings.validate_every}"]
        with self._stage("train a small transformer from nothing", *words) as on_step:
            return train_transformer(self.codes, self.trained, settings, device=self.config.device, on_step=on_step)

    def _draw(self, name: str, source: Path | str) -> SampleResult:
        folder, config = self._samples(name), self.config
        words = ("sample", "--model", source, "--classes", "all", "--per-class", config.per_class)
        # a setting given turns off those a model suggests, which are for looking at, not for measuring
        words = (*words, "--cfg", SampleConfig().cfg, "--seed", config.seed, "--out", folder)
        title = "draw with the model trained just now" if name == "trained" else "draw with the model of varcli"
        with self._stage(title, *words) as on_step:
            generator = Generator.load(source, config.device)
            wanted = [(number, index) for number in range(len(generator.classes)) for index in range(config.per_class)]
            model = str(find_model(source).folder.name)
            return sample_to_folder(
                generator,
                wanted,
                folder,
                SampleConfig(seed=config.seed),
                model=model,
                batch_size=_DRAW_BATCH,
                on_step=on_step,
            )

    def _measure(self, name: str) -> EvalResult:
        folder = self._samples(name)
        title = f"measure the pictures of {'the model trained just now' if name == 'trained' else name}"
        with self._stage(title, "eval", folder, "--ref", self.images) as on_step:
            config = EvalConfig(reference=str(self.images), device=self.config.device)
            return evaluate(folder, config, on_step)

    def _compare(self) -> Path:
        """Put the first images of each class side by side: trained here, varcli's, real and held out."""
        tree = open_images(self.images)
        labels, paths = tree.splits["val"].labels, tree.splits["val"].paths
        numbers, count = range(len(tree.classes)), min(_COMPARED, self.config.per_class)
        real = [self.images / paths[place] for number in numbers for place in np.flatnonzero(labels == number)[:count]]
        drawn = [
            [self._samples(name) / sample_name(number, index) for number in numbers for index in range(count)]
            for name in self._models()
        ]
        blocks = [make_grid(torch.cat(list(read_images(files))), columns=count) for files in (*drawn, real)]
        width, height = blocks[0].size
        picture = Image.new("RGB", (len(blocks) * (width + _GAP) - _GAP, height), "white")
        for place, block in enumerate(blocks):
            picture.paste(block, (place * (width + _GAP), 0))
        save_png(self.out / "comparison.png", picture)
        return self.out / "comparison.png"

    def _samples(self, name: str) -> Path:
        return self.out / f"samples-{name}"

    def _training_config(self) -> TrainConfig:
        """Settings for the time there is: those of the run to go on with, else by timing a few steps."""
        config = TrainConfig(
            depth=4,
            width=128,
            batch_size=_BATCH_SIZE,
            steps=self.config.steps,
            validate_every=100,
            seed=self.config.seed,
        )
        stored = self.trained / CONFIG_NAME
        if config.steps is None and stored.is_file():
            config = replace(config, steps=int(read_json(stored)["config"]["steps"]))
        if config.steps is None:
            seconds = _time_step(config, CodesCache.open(self.codes), resolve_device(self.config.device))
            steps = round(60 * self.config.minutes / seconds, -1)
            config = replace(config, steps=int(min(max(steps, _MIN_STEPS), _MAX_STEPS)))
        return config

    @contextmanager
    def _stage(self, title: str, *words: object) -> Iterator[OnStep]:
        command = shlex.join(["varcli", *map(str, words)])
        stage = Stage(number=len(self.seconds) + 1, title=title, command=command)
        start = monotonic()
        yield self.on_stage(stage)
        self.seconds[title] = round(monotonic() - start, 1)


def _time_step(config: TrainConfig, cache: CodesCache, device: torch.device) -> float:
    """Seconds that a step of training takes: the fastest of a few, on made-up data."""
    model_config = config.transformer(
        step_lengths=PatchNums(cache.patch_nums).step_lengths,
        vocab_size=cache.vocab_size,
        code_channels=int(cache.info["code_channels"]),
        num_classes=len(cache.classes),
    )
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        model = Transformer(model_config).to(device)
        labels_B = torch.zeros(config.batch_size, dtype=torch.long, device=device)
        length = model_config.seq_len - model_config.step_lengths[0]
        x_BLZ = torch.randn(config.batch_size, length, model_config.code_channels, device=device)

        def work() -> None:
            model(labels_B, x_BLZ).logsumexp(dim=-1).sum().backward()

        return min(time_once(work, device) for _ in range(_TIMED_STEPS))
