"""Laws of several processes: one rank equals two, one voice for errors, stops and resumes together.

All that is done by two processes is done when the first test asks, since importing torch takes longer.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from ranks import ROOT, Ended, run_launches
from small_sets import write_tiny_images
from small_tokenizer import SMALL

from varcli import config as configs
from varcli.artifacts.verify import read_json_lines, read_manifest
from varcli.distributed import World
from varcli.errors import ConfigError
from varcli.tokenizer.store import load_tokenizer
from varcli.training.checkpoint import list_checkpoints
from varcli.training.parallel import average_gradients, average_numbers, share_batch
from varcli.training.tokenizer import train_tokenizer
from varcli.training.tokenizer_settings import TokenizerTrainConfig

pytestmark = pytest.mark.xdist_group("tokenizer ranks")  # one worker starts them once

CONFIG = TokenizerTrainConfig(
    tokenizer=SMALL,
    steps=8,
    batch_size=4,
    warmup_steps=2,
    learning_rate=1e-3,
    codebook_init="data",
    perceptual_weight=0.0,
    adversarial_start=0.25,
    scale_dropout=0.5,
    restart_every=3,
    log_every=1,
    validate_every=8,
    save_every=4,
)  # everything that is drawn at random or counted over the batch is at work

# what each process runs: the arguments are images, out, a config as JSON, and what to do in the middle
RANK = """
    import json, os, signal, sys, time
    from pathlib import Path
    import torch
    torch.set_num_threads(1)
    from varcli import config as configs
    from varcli.cli.app import report_error
    from varcli.distributed import join_world
    from varcli.errors import DataError
    from varcli.progress import Step
    from varcli.training import tokenizer_trainer
    from varcli.training.tokenizer import train_tokenizer
    from varcli.training.tokenizer_settings import TokenizerTrainConfig
    images, out, config, deed = sys.argv[1:]
    right = tokenizer_trainer.TokenizerTrainer.train_step
    def train_step(self, step):
        if step == 5 and self.world.rank == 1 and deed == "raise":
            raise DataError("a picture is gone")
        if step == 5 and deed == "raise both":
            raise DataError("a picture is gone")
        if step == 5 and self.world.rank == 1 and deed == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if step == 5 and self.world.rank == 1 and deed == "stop":
            os.kill(os.getpid(), signal.SIGTERM)
        return right(self, step)
    tokenizer_trainer.TokenizerTrainer.train_step = train_step
    config = configs.from_dict(TokenizerTrainConfig, json.loads(config))
    try:
        with join_world("cpu") as (world, device):
            told = lambda step: print(world.rank, step.message, flush=True) if step.message else None
            train_tokenizer(Path(images), Path(out), config, device=device, on_step=told, world=world)
    except Exception as error:
        sys.exit(report_error(error))
"""


def losses(run: Path, name: str = "loss") -> list[float]:
    return [line[name] for line in read_json_lines(run / "metrics.jsonl") if line["kind"] == "train" and name in line]


def published(run: Path) -> dict[str, torch.Tensor]:
    return load_tokenizer(run / "tokenizer").state_dict()


LAUNCHES = {  # run: its config, and what happens in the middle
    "two": (CONFIG, ""),
    "begun by one": (CONFIG, ""),
    "stopped": (CONFIG, "stop"),
    "raise": (CONFIG, "raise"),
    "raise both": (CONFIG, "raise both"),
    "die": (CONFIG, "die"),
    "uneven": (configs.replace(CONFIG, {"batch_size": 5}), ""),
}


class Root(NamedTuple):
    """The runs of this file, beside `one` of a process alone, and what became of the two processes of each."""

    folder: Path
    images: Path
    ended: dict[str, list[Ended]]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Root:
    folder = tmp_path_factory.mktemp("parallel")
    images = write_tiny_images(folder / "images")
    train_tokenizer(images, folder / "one", CONFIG, device="cpu")
    begin(images, folder / "begun by one")
    given = [
        (str(images), str(folder / name), json.dumps(configs.to_dict(config)), deed)
        for name, (config, deed) in LAUNCHES.items()
    ]
    ended = run_launches(RANK, [(2, 2, arguments) for arguments in given])
    return Root(folder, images, dict(zip(LAUNCHES, ended, strict=True)))


def begin(images: Path, out: Path) -> None:
    """Train alone, to a checkpoint and a step beyond."""

    class Stop(Exception):
        pass

    def stop(step):
        if step.unit == "steps" and step.done >= 5:
            raise Stop

    with pytest.raises(Stop):
        train_tokenizer(images, out, CONFIG, device="cpu", on_step=stop)


@pytest.mark.distributed
def test_one_rank_equals_two(root):
    ended, one = root.ended["two"], root.folder / "one"
    assert [code for code, _, _ in ended] == [0, 0], ended
    told = [line for _, out, _ in ended for line in out.splitlines()]
    assert told and all(line.startswith("0 ") for line in told)  # one process speaks
    for name in ("loss", "gradient_norm", "discriminator_loss", "fake_logit", "adversarial_loss", "codes_restarted"):
        found, expected = losses(root.folder / "two", name), losses(one, name)
        torch.testing.assert_close(found[:3], expected[:3], rtol=1e-3, atol=1e-5)
        # sums in another order grow as the judge and the judged chase one another: 5e-3 in the last of eight steps
        torch.testing.assert_close(found, expected, rtol=3e-2, atol=1e-4)
    torch.testing.assert_close(losses(root.folder / "two"), losses(one), rtol=1e-5, atol=0)
    assert sum(losses(one, "codes_restarted")) and losses(one, "adversarial_loss")
    expected, found = published(one), published(root.folder / "two")
    for name, tensor in expected.items():
        # AdamW turns even the rounding noise of gradients that are zero into steps; they say nothing in the output
        torch.testing.assert_close(found[name], tensor, rtol=1e-2, atol=2e-3, msg=lambda text, name=name: name + text)
    quantizer = "quantizer.codebook.weight"
    torch.testing.assert_close(found[quantizer], expected[quantizer], rtol=1e-3, atol=1e-4)


@pytest.mark.distributed
def test_a_stop_of_one_rank_stops_all_at_the_same_step_and_any_number_goes_on(root):
    ended, run = root.ended["stopped"], root.folder / "stopped"
    assert sorted(code for code, _, _ in ended) == [1, 75], ended
    text = "".join(err for _, _, err in ended)
    assert text.count("error:") == 1 and "stopped by SIGTERM after step 6 of 8" in text
    assert list_checkpoints(run)[0].name == "step-0000006"
    train_tokenizer(root.images, run, CONFIG, device="cpu")  # two ranks' checkpoint, one goes on
    torch.testing.assert_close(losses(run), losses(root.folder / "one"), rtol=1e-3, atol=1e-5)


@pytest.mark.distributed
def test_one_rank_begins_and_two_go_on(root):
    ended = root.ended["begun by one"]
    assert [code for code, _, _ in ended] == [0, 0], ended
    assert "going on from step 4 of 8" in ended[0].out
    found, expected = (losses(root.folder / name) for name in ("begun by one", "one"))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.distributed
@pytest.mark.parametrize(
    "deed, text",
    [
        ("raise", "a picture is gone"),
        ("raise both", "a picture is gone"),
        ("die", "process 1 has ended or cannot be reached"),
    ],
)
def test_a_rank_that_fails_or_dies_ends_all_with_one_text(root, deed, text):
    ended = root.ended[deed]
    codes = [code for code, _, _ in ended]
    assert codes == [1, -signal.SIGKILL if deed == "die" else 1], ended
    written = "".join(err for _, _, err in ended)
    assert written.count("error:") == 1 and text in written, written
    assert read_manifest(list_checkpoints(root.folder / deed)[0], "checkpoint").info["step"] == 4


@pytest.mark.distributed
def test_a_batch_that_cannot_be_divided_is_one_error_and_nothing_is_written(root):
    ended = root.ended["uneven"]
    assert [code for code, _, _ in ended] == [1, 1], ended
    written = "".join(err for _, _, err in ended)
    assert written.count("error:") == 1 and "a batch of 5 cannot be divided evenly among 2 processes" in written
    assert "use e.g. 4" in written
    assert not (root.folder / "uneven").exists()


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.timeout(240)
def test_torchrun_prints_one_result_and_a_signal_to_it_saves(tiny_images, tmp_path):
    settings = ["--batch-size", "4", "--device", "cpu", "--set", "tokenizer.width=8", "--set", "perceptual_weight=0"]
    settings += ["--set", "tokenizer.norm_groups=2", "--set", "tokenizer.patch_nums=[1,2,4]", "--set", "save_every=0"]
    settings += ["--set", "tokenizer.channel_multipliers=[1,1,1,1]", "--set", "validate_every=0", "--json"]
    settings += ["--steps", "60", "--set", "log_every=1"]
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "varcli"]
    command = [*start, "train-tokenizer", str(tiny_images), "--out", str(tmp_path / "run"), *settings]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    first = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "run" / "metrics.jsonl"
    try:
        while not (log.exists() and log.stat().st_size) and first.poll() is None:
            time.sleep(0.1)
        first.send_signal(signal.SIGTERM)
        _, written = first.communicate(timeout=100)
    finally:
        first.kill()
    assert written.count("error: stopped by SIGTERM") == 1, written[-3000:]
    assert 0 < read_manifest(list_checkpoints(tmp_path / "run")[0], "checkpoint").info["step"] < 60
    second = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert second.returncode == 0, second.stderr[-3000:]
    assert json.loads(second.stdout)["steps"] == 60
    assert [line["step"] for line in read_json_lines(log) if line["kind"] == "train"] == list(range(1, 61))


def test_a_batch_is_shared_evenly_or_not_at_all():
    assert [share_batch(12, World(rank, 3)) for rank in range(3)] == [4, 4, 4]
    for batch_size, hint in ((10, "9"), (2, "3")):
        with pytest.raises(ConfigError, match="divided evenly among 3") as caught:
            share_batch(batch_size, World(1, 3))
        assert f"e.g. {hint}" in caught.value.hint


def test_alone_nothing_is_exchanged_or_changed():
    alone, parameter = World(), torch.nn.Parameter(torch.ones(2))
    parameter.grad = gradient = torch.tensor([1.0, 2.0])
    average_gradients([parameter], alone)
    assert parameter.grad is gradient and gradient.tolist() == [1.0, 2.0]
    value = torch.tensor(3.0)
    assert average_numbers({"loss": value}, alone)["loss"] is value
    assert alone.sum(value) is value and alone.mean(value) is value and alone.gather(gradient) is gradient
    assert alone.largest(3, False) == [3, False]
    alone.copy_first(value)
    alone.wait()
