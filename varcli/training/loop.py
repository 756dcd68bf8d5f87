"""The loop that every training shares: steps, logs, validation, pictures, checkpoints, signals.

How a trainer is plugged in: subclass `Trainer`, open the run folder, let `settle` hold the settings against those the
run was begun with, build the trainer, and run:

    with open_run(out, resume) as run:
        config = ...                            # new, or filled up from run.config
        run.settle("tokenizer", to_dict(config), {"images": digest}, free=LoopConfig.FREE)
        trainer = TokenizerTrainer(config, ...) # same seed, same weights: a resumed run loads its own over them
        result = run_training(trainer, run, LoopConfig(steps=config.steps, ...), on_step=on_step)

`run_training` loads the checkpoint into `trainer.parts`, which therefore must name everything that changes: modules,
optimizers, averages, generators. What a step draws must come from those generators or from torch's own, and which
samples it takes from the step's number; then a resumed run is the same run, bit for bit on a CPU.

With several processes (`open_run(out, resume, world)`, a trainer that knows the world) all of them run this loop and the
trainer's `train_step`; the first one alone logs, validates, draws and publishes, while the others wait.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from varcli.artifacts.write import prepare_folder
from varcli.data.png import save_png
from varcli.errors import ConfigError, InterruptedRun, NumericError, VarcliError
from varcli.progress import OnStep, Step, counted, ignore
from varcli.training.checkpoint import amend_checkpoint, checkpoint_name, load_checkpoint, save_checkpoint
from varcli.training.memory import memory_limits
from varcli.training.meter import Meter, SkipPolicy
from varcli.training.pace import Pace
from varcli.training.run import RunFolder
from varcli.training.runlog import RunLog
from varcli.training.signals import StopRequest
from varcli.training.state import undisturbed
from varcli.training.trainer import Trainer

OnValidation = Callable[[Path], None]

SAMPLES_NAME = "samples"
# what may be due after a step beside log and checkpoint, and its lines in the log
_LOOKS = {"validate": "validation", "sample": None, "eval": "evaluation"}
_HEARTBEAT = 0.5  # seconds between reports that only move the bar


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """When the loop does what. Steps are optimizer steps; 0 means never."""

    steps: int  # of the whole run
    log_every: int = 50  # steps between log lines, each of which waits for the device
    validate_every: int = 0  # steps between validations; one more comes at the end
    sample_every: int = 0  # steps between pictures; one more comes at the end
    eval_every: int = 0  # steps between evaluations of samples; one more comes at the end
    save_every: int = 1000  # steps between checkpoints; one more comes at the end
    save_minutes: float = 10.0  # minutes between checkpoints, if that is sooner
    keep_checkpoints: int = 2  # newest ones that stay
    keep_best: bool = False  # publish the weights of the best validation loss instead of the last ones
    tensorboard: bool = True  # write TensorBoard's files if it is installed

    FREE: ClassVar[frozenset[str]] = frozenset(
        {"steps", "log_every", "validate_every", "sample_every", "eval_every", "save_every"}
        | {"save_minutes", "keep_checkpoints", "keep_best", "tensorboard"}
    )
    """Settings that a resumed run may change."""

    def __post_init__(self) -> None:
        for name in ("steps", "log_every", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, but is {getattr(self, name)}")
        for name in ("validate_every", "sample_every", "eval_every", "save_every", "save_minutes"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must be 0 or more, but is {getattr(self, name)}")


@dataclass
class LoopResult:
    """How a run stands."""

    step: int = 0  # optimizer steps done
    seconds: float = 0.0  # spent training, over all resumptions
    values: dict[str, float] = field(default_factory=dict)  # of the last log line
    validation: dict[str, Any] = field(default_factory=dict)  # last one of this process
    best: dict[str, float] | None = None  # {"step": ..., "loss": ...} of the best validation


def run_training(
    trainer: Trainer,
    run: RunFolder,
    config: LoopConfig,
    on_step: OnStep = ignore,
    info: Mapping[str, Any] | None = None,
    on_validation: OnValidation | None = None,
) -> LoopResult:
    """Train until `config.steps`, from the run's checkpoint if it has one.

    info: more JSON for the manifests of checkpoints and published weights. on_validation: called with the run folder when
    a validation is in its log; a VarcliError of it is told and the run goes on. Raises InterruptedRun after a signal, with
    the state saved; NumericError if too many steps were no numbers; MemoryLimitError; ArtifactError if the disk is
    full. After any of them the same call goes on from the last checkpoint.
    """
    loop = _Loop(trainer, run, config, on_step if run.world.is_first else ignore, dict(info or {}), on_validation)
    try:
        with StopRequest(loop._report) as stop, memory_limits(trainer, run.world):
            return loop.run(stop)
    finally:
        loop.close()


class _Loop:
    """One call of `run_training`."""

    def __init__(
        self,
        trainer: Trainer,
        run: RunFolder,
        config: LoopConfig,
        on_step: OnStep,
        info: dict[str, Any],
        on_validation: OnValidation | None,
    ) -> None:
        self.on_validation, self.world = on_validation, run.world
        self.trainer, self.run_folder, self.config, self.on_step, self.info = trainer, run, config, on_step, info
        self.result = LoopResult(step=run.step)
        self.policy = SkipPolicy(hint=trainer.numeric_hint)
        self.parent: str | None = None
        self.saved_step: int | None = None
        self.pending: list[str] = []
        self.before = self.world.size  # processes that wrote the checkpoint
        if run.checkpoint is not None:
            folder, manifest = run.checkpoint
            load_checkpoint(folder, manifest, trainer.parts)
            self.result.seconds = float(manifest.info.get("seconds", 0.0))
            self.result.best = manifest.info.get("best")
            # a look that is turned off now, e.g. since it failed, is not made up for
            self.pending = [name for name in manifest.info.get("pending", []) if getattr(config, f"{name}_every")]
            self.policy.steps = list(manifest.info.get("skipped_steps", []))
            self.parent, self.saved_step = manifest.digest, self.result.step
            self.before = int(manifest.info.get("processes", self.before))
            trainer.recall(manifest.info.get("remembered", {}))
        self.world.wait()  # for a processor's work that takes long, such as decoding; a GPU that waits says nothing
        trainer.parts.start_alike(self.world)
        self.log: RunLog | None = None
        if run.world.is_first:
            again = [kind for name, kind in _LOOKS.items() if name in self.pending and kind]
            self.log = RunLog(run.path, self.result.step, config.tensorboard, self._report, again)
        self.meter = Meter()
        planned = (trainer.planned_seconds, trainer.planned_bytes)
        self.pace = Pace(trainer.batch_size, self.world.size, trainer.parts.device, *planned)
        self.last_save = self.last_report = self.window_start = time.monotonic()

    def close(self) -> None:
        """Flush the log."""
        if self.log is not None:
            self.log.close()

    def run(self, stop: StopRequest) -> LoopResult:
        config = self.config
        if self.result.step == config.steps:
            self._report(f"`{self.run_folder.path}` has all its {config.steps:,} steps already")
        elif self.result.step:
            # the order of samples stays; sums are added up in another one, so that the last digits differ
            now = counted(self.world.size, "process", "processes")
            others = f", with {now} instead of {self.before}" if self.before != self.world.size else ""
            begun = (self.run_folder.config or {}).get("steps", config.steps)
            others += f", begun for {begun:,}" if begun != config.steps else ""
            self._report(f"going on from step {self.result.step:,} of {config.steps:,}{others}")
        self._look(self.pending)
        self.window_start = self.last_save = time.monotonic()
        for step in range(self.result.step, config.steps):
            self.meter.add(step, self.trainer.train_step(step))
            self.result.step = done = step + 1
            is_last = done == config.steps
            due = {
                "log": _due(done, config.log_every),
                "validate": _due(done, config.validate_every) or (is_last and config.validate_every > 0),
                "sample": _due(done, config.sample_every) or (is_last and config.sample_every > 0),
                "eval": _due(done, config.eval_every) or (is_last and config.eval_every > 0),
                "save": _due(done, config.save_every) or is_last or self._is_save_time(),
            }
            # clocks and signals reach each process at another moment: what comes after this is for the next step
            stopped_by, due["save"] = self.world.largest(stop.number, due["save"])
            if any(due.values()) or stopped_by:
                self._read()
            measured = self.pace.note(config.steps - done)
            if measured:
                self._report(measured)
            looks = [name for name in _LOOKS if due[name]]
            if stopped_by:
                self._save(looks)
                name = signal.Signals(stopped_by).name
                raise InterruptedRun(
                    f"stopped by {name} after step {done:,} of {config.steps:,}; the state is saved in "
                    f"`{self.run_folder.path}`",
                    "run the same command again to go on",
                )
            if due["save"]:
                self._save(looks, publish=not looks)  # before a look that may fail, so that it costs no step
            self._look(looks)
            if any(due.values()):
                self.pace.pause(time.monotonic() - self.window_start)
                self.window_start = time.monotonic()
            elif time.monotonic() - self.last_report > _HEARTBEAT:
                self._report()
        published = self.trainer.published
        if self.world.largest(self.world.is_first and not self.run_folder.holds(published, published))[0]:
            with self.trainer.assembled():
                self._publish()  # a kill may have come between a checkpoint and this
        if not math.isfinite(self.result.validation.get("loss", 0.0)):
            raise NumericError(
                f"all {config.steps:,} steps are done, but the validation loss is no number: training has diverged",
                "lower the learning rate and choose another --out",
            )
        return self.result

    def _read(self) -> None:
        """Wait for the device, log what happened since the last time, and judge skipped steps."""
        done, num_steps = self.result.step, len(self.meter)
        values, skipped = self.meter.read()
        if self.log is not None:
            self._write(self.log, values, skipped, num_steps)
        self.policy.note(skipped, done)
        self.window_start = time.monotonic()

    def _write(self, log: RunLog, values: dict[str, float], skipped: Sequence[int], num_steps: int) -> None:
        """Log and report what `num_steps` steps came to."""
        done = self.result.step
        seconds = time.monotonic() - self.window_start
        self.result.seconds += seconds
        values["images_per_second"] = num_steps * self.trainer.batch_size / max(seconds, 1e-9)
        self.result.values = values
        log.write("train", done, {**values, "seconds": round(self.result.seconds, 3)})
        for step in skipped:
            log.write("event", step + 1, {"event": "not a number", **self.trainer.describe_batch(step)})
            self._report(f"step {step + 1:,} was skipped: its loss or gradients were no numbers")
        self._report()

    def _look(self, names: list[str]) -> None:
        """Validate, draw and evaluate, if they are among `names`: the first process, while the others wait.

        If this step's checkpoint is there already, it learns what was found, and its weights are published.
        """
        if not names:
            return
        with self.trainer.assembled():
            if self.log is not None:
                if "validate" in names:
                    self._validate(self.log)
                if "sample" in names:
                    self._draw(self.log)
                if "eval" in names:
                    self._evaluate(self.log)
                if self.saved_step == self.result.step:
                    changes = {"best": self.result.best, "pending": [], "remembered": self.trainer.remember()}
                    self.parent = amend_checkpoint(self.run_folder.path, self.saved_step, changes).digest
                    self._publish_newest()
            self.world.wait()

    def _validate(self, log: RunLog) -> None:
        with undisturbed(self.trainer.parts.device):
            values = dict(self.trainer.validate())
        if not values:
            return
        done, loss = self.result.step, values.get("loss")
        self.result.validation = values
        log.write("validation", done, values)
        best = self.result.best
        is_best = loss is not None and math.isfinite(loss) and (best is None or loss < best["loss"])
        if is_best:
            self.result.best = {"step": done, "loss": loss}
            if self.config.keep_best:
                self._publish()
        shown = ", ".join(f"{name} {values[name]:.4g}" for name in self.trainer.shown if name in values)
        self._report(f"validation after step {done:,}: {shown}{' (best so far)' if is_best else ''}")
        for about, text in self.trainer.find_faults(done, values).items():
            if log.write_warning(done, about, text):
                self._report(f"warning: {text}")
        try:
            if self.on_validation is not None:
                self.on_validation(self.run_folder.path)
        except VarcliError as error:  # what others make of the log is not worth a run
            self._report(f"after step {done:,}: {error}")

    def _draw(self, log: RunLog) -> None:
        try:
            with undisturbed(self.trainer.parts.device):
                image = self.trainer.draw(self.result.step)
        except VarcliError as error:  # a picture is not worth a run
            self._report(f"no picture after step {self.result.step:,}: {error}")
            return
        if image is None:
            return
        folder = prepare_folder(self.run_folder.path / SAMPLES_NAME)
        save_png(folder / f"{checkpoint_name(self.result.step)}.png", image)
        log.write_image(self.result.step, image)

    def _evaluate(self, log: RunLog) -> None:
        done = self.result.step
        try:
            with undisturbed(self.trainer.parts.device):
                values = dict(self.trainer.evaluate(done))
        except VarcliError as error:  # numbers for the eye are not worth a run
            self._report(f"no evaluation after step {done:,}: {error}")
            return
        if values:
            log.write("evaluation", done, values)
            shown = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
            self._report(f"evaluation after step {done:,}: {shown}")

    def _save(self, pending: Sequence[str] = (), publish: bool = True) -> None:
        """Write a checkpoint, together with the other processes.

        pending: looks that are due at this step, for whoever goes on from here. publish: write the weights too.
        """
        done = self.result.step
        if self.saved_step != done:
            info = {
                **self.info,
                "trained": self.trainer.published,
                "run": self.run_folder.digest,
                "parent": self.parent,
                "processes": self.world.size,
                "seconds": round(self.result.seconds, 3),
                "best": self.result.best,
                "skipped_steps": self.policy.steps,
                "pending": list(pending),
                "remembered": self.trainer.remember(),
            }
            parts, keep = self.trainer.parts, self.config.keep_checkpoints
            manifest = save_checkpoint(self.run_folder.path, done, parts, info, keep, self.world)
            self.parent = manifest and manifest.digest
            self.saved_step = done
        if publish:
            with self.trainer.assembled():
                self._publish_newest()
        self.world.wait()
        self.last_save = time.monotonic()

    def _publish_newest(self) -> None:
        """Publish this step's weights, unless the best ones are wanted and known."""
        if not (self.config.keep_best and self.result.best is not None):
            self._publish()

    def _publish(self) -> None:
        if not self.world.is_first:
            return
        best = self.result.best
        is_best = best is not None and best["step"] == self.result.step
        info = {**self.info, "step": self.result.step, "steps": self.config.steps}
        info["validation_loss"] = best["loss"] if is_best else None
        self.trainer.publish(self.run_folder.path / self.trainer.published, info)

    def _is_save_time(self) -> bool:
        minutes = self.config.save_minutes
        return minutes > 0 and time.monotonic() - self.last_save >= 60 * minutes

    def _report(self, message: str | None = None) -> None:
        names = {"learning_rate": "lr", "images_per_second": "img/s"}
        values = {
            names.get(name, name): self.result.values[name]
            for name in (*self.trainer.shown, *names)
            if name in self.result.values
        }
        # what a display with more room may show: the last log line and validation, which are replaced, never changed
        details = {"train": self.result.values, "validation": self.result.validation, "best": self.result.best}
        self.on_step(
            Step(
                done=self.result.step,
                total=self.config.steps,
                values=values,
                message=message,
                details={**details, "seconds": self.result.seconds},
            )
        )
        self.last_report = time.monotonic()


def _due(done: int, every: int) -> bool:
    return every > 0 and done % every == 0
