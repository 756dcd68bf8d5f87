"""What the shared loop trains: the contract between `varcli.training.loop` and each trainer."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from varcli.training.meter import SkipPolicy
from varcli.training.state import Parts


class Trainer:
    """What is trained: one step of it, and what to do with the result. Only `train_step` must be overridden.

    parts: everything that changes, see `Parts`. batch_size: images a step, for rates. published: name of the folder
    within the run that `publish` writes, which is its kind too. shown: names of numbers worth a place in the progress
    line.
    """

    parts: Parts
    batch_size: int
    published: str
    shown: tuple[str, ...] = ("loss", "accuracy")
    planned_seconds: float | None = None  # a step takes, as far as was known before the first
    planned_bytes: int | None = None  # of memory at its peak, likewise
    memory_hint: str = "use a smaller --batch-size"
    numeric_hint: str = SkipPolicy.hint  # what to change when the loss is no longer a number

    def train_step(self, step: int) -> Mapping[str, Tensor | float]:
        """Do optimizer step `step`, counted from 0, and return numbers for the log.

        0-d tensors stay on the device and are averaged between log lines; floats are logged as they are last, and whole
        numbers are counts, whose sum is logged.
        "skipped", if there (`Updater.finish` gives it), is 1 for a step that changed nothing because it was no number.
        """
        raise NotImplementedError

    def assembled(self) -> AbstractContextManager[None]:
        """Around what the first process does alone: validate, publish, draw, evaluate. All processes enter and leave it.

        A trainer whose weights are spread over the processes puts them together here.
        """
        return nullcontext()

    def validate(self) -> Mapping[str, Any]:
        """Measure on held-out data; "loss" decides which weights are best. Nothing if there is none to measure on."""
        return {}

    def remember(self) -> dict[str, Any]:
        """Return what of the last validation decides what comes later, as JSON, for a checkpoint's manifest."""
        return {}

    def recall(self, remembered: Mapping[str, Any]) -> None:
        """Take over what `remember` returned before the run was stopped."""

    def find_faults(self, step: int, validation: Mapping[str, Any]) -> Mapping[str, str]:
        """Say what a validation after `step` steps shows to be wrong: warnings by what they are about, each told once a run."""
        return {}

    def publish(self, folder: Path, info: Mapping[str, Any]) -> None:
        """Write the weights that later commands read, whole or not at all, to `folder`."""

    def draw(self, step: int) -> Image.Image | None:
        """Draw a picture of where things stand after `step` steps; None if there is nothing to draw with."""
        return None

    def evaluate(self, step: int) -> Mapping[str, float]:
        """Measure samples drawn after `step` steps, as `varcli eval` does; nothing if there is nothing to draw with."""
        return {}

    def describe_batch(self, step: int) -> dict[str, Any]:
        """Say which samples step `step` took, as JSON: logged if the step was no number."""
        return {}
