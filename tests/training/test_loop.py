"""Laws of the loop: resuming equals never stopping, a kill costs steps only, bad steps are refused, signals save."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from toy_trainer import ToyTrainer, train_toy

import varcli
from varcli.artifacts.verify import read_manifest, verify_folder
from varcli.distributed import World
from varcli.errors import ArtifactError, ConfigError, InterruptedRun, LockedError, MemoryLimitError, NumericError
from varcli.progress import Step
from varcli.training.checkpoint import list_checkpoints
from varcli.training.loop import LoopConfig, run_training
from varcli.training.run import open_run
from varcli.training.runlog import read_log

TESTS = Path(__file__).parent.parent


def losses(run: Path) -> dict[int, tuple[str, str]]:
    """Loss and gradient norm of every step, as float hex."""
    return {line["step"]: (line["loss"].hex(), line["gradient_norm"].hex()) for line in read_log(run, "train")}


def weights(run: Path) -> str:
    """Digest of all that the last checkpoint holds, random state included, and of what was published."""
    files = sorted([*list_checkpoints(run)[0].glob("*.safetensors"), *(run / "toy").glob("*.safetensors")])
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


class StopAt(ToyTrainer):
    """Sends its own process a signal in the middle of a step."""

    def __init__(self, step: int, number: int = signal.SIGTERM) -> None:
        super().__init__(20)
        self.stop_step, self.number = step, number

    def train_step(self, step):
        if step == self.stop_step:
            os.kill(os.getpid(), self.number)
        return super().train_step(step)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> Path:
    """A run that was never stopped."""
    out = tmp_path_factory.mktemp("unbroken") / "run"
    train_toy(out)
    return out


@pytest.mark.parametrize("step", [0, 4, 6, 13, 18])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_and_resuming_equals_never_stopping(tmp_path, unbroken, step, number):
    with pytest.raises(InterruptedRun) as caught:
        train_toy(tmp_path / "run", trainer=StopAt(step, number))
    assert caught.value.exit_code == 75
    assert list_checkpoints(tmp_path / "run")[0].name == f"step-{step + 1:07d}"
    result = train_toy(tmp_path / "run")
    assert result.step == 20
    assert losses(tmp_path / "run") == losses(unbroken)
    assert weights(tmp_path / "run") == weights(unbroken)
    assert read_log(tmp_path / "run", "validation") == read_log(unbroken, "validation")


def test_a_signal_that_comes_when_processes_have_agreed_waits_for_the_next_step(tmp_path, unbroken, monkeypatch):
    """The one process that had it stopped at once, and waited for ever for the others, who were a step further."""
    agree, steps = World.largest, []

    def largest(self, *values):
        agreed = agree(self, *values)
        if len(values) == 2:
            steps.append(agreed)
            if len(steps) == 3:
                os.kill(os.getpid(), signal.SIGTERM)
        return agreed

    with monkeypatch.context() as patch:
        patch.setattr(World, "largest", largest)
        with pytest.raises(InterruptedRun, match="stopped by SIGTERM after step 4 of 20"):
            train_toy(tmp_path / "run")
    assert [folder.name for folder in list_checkpoints(tmp_path / "run")] == ["step-0000004"]
    train_toy(tmp_path / "run")
    assert losses(tmp_path / "run") == losses(unbroken) and weights(tmp_path / "run") == weights(unbroken)


def test_a_second_interrupt_leaves_at_once(tmp_path):
    class Impatient(StopAt):
        def train_step(self, step):
            if step == self.stop_step:
                os.kill(os.getpid(), signal.SIGINT)
            return super().train_step(step)

    with pytest.raises(KeyboardInterrupt):
        train_toy(tmp_path / "run", trainer=Impatient(7, signal.SIGINT))
    assert list_checkpoints(tmp_path / "run")[0].name == "step-0000005"
    assert train_toy(tmp_path / "run").step == 20


def test_handlers_come_back(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    train_toy(tmp_path / "run")
    assert signal.getsignal(signal.SIGTERM) == before


SLOW_RUN = """
    import sys, time, torch
    sys.path.insert(0, {tests!r})
    torch.set_num_threads(1)
    from toy_trainer import ToyTrainer, train_toy
    class Slow(ToyTrainer):
        def train_step(self, step):
            time.sleep(0.01)
            return super().train_step(step)
    print("ready", flush=True)
    train_toy({out!r}, trainer=Slow(20), save_every=2)
"""


def start_slow_run(out: Path) -> subprocess.Popen:
    code = textwrap.dedent(SLOW_RUN).format(tests=str(TESTS), out=str(out))
    environment = {**os.environ, "PYTHONPATH": str(Path(varcli.__file__).parent.parent)}
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=environment)
    assert process.stdout.readline() == b"ready\n"
    return process


@pytest.mark.slow
def test_a_killed_run_loses_steps_only(tmp_path, unbroken):
    dice = random.Random(0)
    out, kills = tmp_path / "run", 0
    for _ in range(6):
        process = start_slow_run(out)
        time.sleep(dice.uniform(0.02, 0.5))
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
        for folder in list_checkpoints(out):
            assert not verify_folder(folder, read_manifest(folder, "checkpoint"))
        steps = [int(folder.name.removeprefix("step-")) for folder in list_checkpoints(out)]
        assert len(steps) >= min(2, max(steps, default=0) // 2)
    assert kills
    train_toy(out, save_every=2)
    assert losses(out) == losses(unbroken)
    assert weights(out) == weights(unbroken)


def test_two_runs_in_one_folder_are_refused_and_a_dead_one_is_not_in_the_way(tmp_path):
    process = start_slow_run(tmp_path / "run")
    try:
        while not (tmp_path / "run" / "config.json").exists():
            time.sleep(0.01)
        with pytest.raises(LockedError):
            train_toy(tmp_path / "run")
    finally:
        process.kill()
        process.wait()
    assert train_toy(tmp_path / "run").step == 20


def test_bad_steps_are_skipped_logged_and_said(tmp_path, unbroken):
    said: list[Step] = []
    out = tmp_path / "run"
    with open_run(out) as run:
        run.settle("toy", {}, {}, free=())
        config = LoopConfig(steps=20, log_every=6, tensorboard=False)
        run_training(ToyTrainer(20, spoilt=(3, 11)), run, config, said.append)
    events = read_log(out, "event")
    assert [(event["step"], event["samples"]) for event in events] == [(4, [3]), (12, [11])]
    assert sum("skipped" in (step.message or "") for step in said) == 2
    assert all(isinstance(line["loss"], float) for line in read_log(out, "train"))


@pytest.mark.parametrize("spoilt", [(6, 7, 8), tuple(range(1, 20, 2))])
def test_too_many_bad_steps_stop_the_run_and_keep_the_good_checkpoint(tmp_path, spoilt):
    out = tmp_path / "run"
    with pytest.raises(NumericError) as caught:
        train_toy(out, trainer=ToyTrainer(20, spoilt=spoilt))
    assert caught.value.exit_code == 7
    assert f"{spoilt[-1] + 1}:" in str(caught.value)  # as the log counts them
    assert "learning rate" in caught.value.hint and "checkpoint" in caught.value.hint
    newest = list_checkpoints(out)[0]
    assert int(newest.name.removeprefix("step-")) <= spoilt[-1]
    assert not verify_folder(newest, read_manifest(newest, "checkpoint"))
    assert train_toy(out, trainer=ToyTrainer(20)).step == 20


def test_a_longer_run_goes_on_and_a_shorter_one_is_refused(tmp_path):
    train_toy(tmp_path / "run", steps=8)
    assert train_toy(tmp_path / "run", steps=12).step == 12
    with open_run(tmp_path / "run") as run, pytest.raises(ConfigError, match="12 steps already"):
        run.is_finished(8)


def test_other_settings_are_refused_by_name(tmp_path):
    train_toy(tmp_path / "run", steps=3)
    with open_run(tmp_path / "run") as run:
        with pytest.raises(ConfigError, match="width was 3, now 4"):
            run.settle("toy", {"steps": 9, "width": 4}, {}, free={"steps"})
        with pytest.raises(ConfigError, match="kind toy, not tokenizer"):
            run.settle("tokenizer", {"width": 3}, {}, free={"steps"})
    with pytest.raises(ConfigError, match="holds a run already"):
        train_toy(tmp_path / "run", resume="never")


def test_a_foreign_folder_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ArtifactError, match="holds no run"):
        train_toy(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_the_log_tolerates_a_torn_tail_and_loses_what_comes_after_the_checkpoint(tmp_path):
    with pytest.raises(InterruptedRun):
        train_toy(tmp_path / "run", trainer=StopAt(9))
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"kind": "train", "step": 11, "loss": 0}) + '\n{"kind": "tr')
    train_toy(tmp_path / "run", steps=12)
    assert [line["step"] for line in read_log(tmp_path / "run", "train")] == list(range(1, 13))


def test_a_log_that_cannot_be_written_does_not_stop_training(tmp_path, monkeypatch):
    def full(path, record):
        raise ArtifactError("disk full")

    monkeypatch.setattr("varcli.training.runlog.append_json_line", full)
    assert train_toy(tmp_path / "run").step == 20


def test_the_best_weights_are_published_if_they_are_to_be_kept(tmp_path):
    best = train_toy(tmp_path / "best", keep_best=True, validate_every=1).best
    manifest = read_manifest(tmp_path / "best" / "toy", "toy")
    assert manifest.info["step"] == best["step"]
    assert manifest.info["validation_loss"] == best["loss"]
    train_toy(tmp_path / "last", validate_every=1)
    assert read_manifest(tmp_path / "last" / "toy", "toy").info["step"] == 20


def test_what_a_kill_left_unpublished_is_published_by_a_rerun(tmp_path):
    train_toy(tmp_path / "run")
    published = tmp_path / "run" / "toy" / "weights.safetensors"
    before = published.read_bytes()
    (tmp_path / "run" / "toy" / "manifest.json").unlink()
    train_toy(tmp_path / "run")
    assert published.read_bytes() == before
    assert not verify_folder(tmp_path / "run" / "toy", read_manifest(tmp_path / "run" / "toy", "toy"))


def test_a_run_that_ends_on_a_validation_that_is_no_number_says_so_and_never_takes_it_for_the_best(tmp_path):
    trainer = ToyTrainer(steps=4)
    losses = iter([1.0, float("nan")])
    trainer.validate = lambda: {"loss": next(losses)}
    with open_run(tmp_path / "run", "auto") as opened:
        opened.settle("toy", {}, {}, ())
        with pytest.raises(NumericError, match="diverged"):
            run_training(trainer, opened, LoopConfig(steps=4, validate_every=2, keep_best=True))
    manifest = read_manifest(tmp_path / "run" / "checkpoints" / "step-0000004", "checkpoint")
    assert manifest.info["best"] == {"step": 2, "loss": 1.0}


def test_a_validation_that_fails_loses_no_step_and_is_made_up_for_or_turned_off(tmp_path, unbroken):
    class Failing(ToyTrainer):
        def validate(self):
            raise torch.OutOfMemoryError("CUDA out of memory")

    for out in (tmp_path / "fixed", tmp_path / "off"):
        with pytest.raises(MemoryLimitError):
            train_toy(out, trainer=Failing(20), validate_every=5)
        newest = list_checkpoints(out)[0]
        assert newest.name == "step-0000005"
        assert read_manifest(newest, "checkpoint").info["pending"] == ["validate"]
    train_toy(tmp_path / "whole", validate_every=5)
    train_toy(tmp_path / "fixed", validate_every=5)
    assert read_log(tmp_path / "fixed", "validation") == read_log(tmp_path / "whole", "validation")
    train_toy(tmp_path / "off", trainer=Failing(20), validate_every=0)
    for out in (tmp_path / "fixed", tmp_path / "off"):
        assert losses(out) == losses(unbroken)


def test_a_checkpoint_knows_what_its_validation_found(tmp_path):
    best = train_toy(tmp_path / "run", validate_every=5).best
    newest, before = (read_manifest(folder, "checkpoint") for folder in list_checkpoints(tmp_path / "run"))
    assert newest.info["best"] == best and newest.info["pending"] == []
    assert newest.info["parent"] == before.digest
    found = read_log(tmp_path / "run", "validation")
    published = read_manifest(tmp_path / "run" / "toy", "toy").info
    assert (published["step"], published["validation_loss"]) == (20, found[-1]["loss"] if best["step"] == 20 else None)


def test_a_kill_between_a_validation_and_its_note_leaves_one_line_of_it(tmp_path, monkeypatch):
    class Kill(BaseException):
        pass

    def kill(*_):
        raise Kill

    with monkeypatch.context() as patch, pytest.raises(Kill):
        patch.setattr("varcli.training.loop.amend_checkpoint", kill)
        train_toy(tmp_path / "run", validate_every=5)
    train_toy(tmp_path / "run", validate_every=5)
    assert [line["step"] for line in read_log(tmp_path / "run", "validation")] == [5, 10, 15, 20]


def test_samples_are_evaluated_when_due_and_a_failure_does_not_end_the_run(tmp_path):
    trainer, told = ToyTrainer(steps=5), []

    def evaluate(step):
        if step == 4:
            raise ConfigError("no reference")
        return {"kid": 1.0 / step}

    trainer.evaluate = evaluate
    with open_run(tmp_path / "run", "auto") as opened:
        opened.settle("toy", {}, {}, ())
        run_training(trainer, opened, LoopConfig(steps=5, eval_every=2), on_step=told.append)
    lines = read_log(tmp_path / "run", "evaluation")
    assert [(line["step"], line["kid"]) for line in lines] == [(2, 0.5), (5, 0.2)]
    assert any("no reference" in (step.message or "") for step in told)


def test_a_run_without_a_checkpoint_is_begun_anew_with_other_settings(tmp_path):
    for width in (7, 1):
        with open_run(tmp_path / "run") as opened:
            opened.settle("toy", {"width": width}, {}, ())
    with open_run(tmp_path / "run", "never") as opened:
        assert opened.config == {"width": 1}


def test_a_picture_that_cannot_be_drawn_does_not_end_the_run(tmp_path):
    trainer, told = ToyTrainer(steps=4), []

    def fail(step):
        raise ConfigError("no such class")

    trainer.draw = fail
    with open_run(tmp_path / "run", "auto") as opened:
        opened.settle("toy", {}, {}, ())
        result = run_training(trainer, opened, LoopConfig(steps=4, sample_every=2), on_step=told.append)
    assert result.step == 4
    assert any("no such class" in (step.message or "") for step in told)


def test_reports_carry_the_last_log_line_and_validation(tmp_path):
    reports = []
    train_toy(tmp_path / "run", steps=8, on_step=reports.append)
    assert reports[0].details["validation"] == {} and reports[0].details["best"] is None
    details, lines = reports[-1].details, read_log(tmp_path / "run")
    last = {kind: [line for line in lines if line["kind"] == kind][-1] for kind in ("train", "validation")}
    for kind in ("train", "validation"):
        assert details[kind]["loss"] == last[kind]["loss"]
    assert details["best"]["step"] in (7, 8) and details["seconds"] > 0
