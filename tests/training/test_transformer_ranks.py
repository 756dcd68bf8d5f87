"""Laws of a transformer trained by several processes: their number and their way to share the work change nothing.

Starting processes takes longer than what they do here, so two launches do all of it, one job after another.
"""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from ranks import run_launches
from toy_codes import write_codes

from varcli import config as configs
from varcli.artifacts.verify import read_manifest
from varcli.tokenizer import VQVAE, TokenizerConfig
from varcli.tokenizer.store import save_tokenizer
from varcli.training import TrainConfig, train_transformer
from varcli.training.checkpoint import list_checkpoints
from varcli.training.runlog import read_log
from varcli.transformer.store import load_transformer

pytestmark = [pytest.mark.distributed, pytest.mark.xdist_group("transformer ranks")]  # one worker starts them once

CONFIG = TrainConfig(
    depth=3,
    width=24,
    num_heads=2,
    steps=5,
    batch_size=8,
    micro_batch_size=1,
    warmup_steps=1,
    learning_rate=3e-3,
    label_dropout=0.5,
    drop_path=0.5,
    dropout=0.0,
    ema_decay=0.9,
    keep_best=False,
    log_every=1,
    validate_every=2,
    sample_every=0,
    save_every=2,
    keep_checkpoints=3,
    tensorboard=False,
)  # all that is drawn for a batch is at work, and four processes still take it in two pieces each
OPEN_GATES = (
    (99, 1.0),
)  # blocks of a new model hardly act: their gates start at 1e-3, and what they drop would not be seen

# what each process runs: jobs are [name of the run, run whose first two steps it goes on from, config, what happens to the last
# process: a signal, NAN or FULL memory at the fourth step, or SMALL memory, which one image fits: two fail on the way back]
PROGRAM = """
    import json, os, shutil, signal, sys
    from pathlib import Path
    import torch
    torch.set_num_threads(1)
    from varcli import config as configs
    from varcli.cli.app import report_error
    from varcli.distributed import join_world
    from varcli.errors import LostProcessError, MemoryLimitError, VarcliError
    from varcli.training import TrainConfig, train_transformer
    from varcli.training.objective import Objective
    from varcli.training.transformer_trainer import TransformerTrainer
    from varcli.transformer import base
    base._GAMMA_BY_DEPTH = ((99, 1.0),)
    root, jobs = Path(sys.argv[1]), json.loads(sys.argv[2])
    right, deed = TransformerTrainer.train_step, None
    def train_step(self, step):
        if step != 3 or self.world.rank != self.world.size - 1 or deed in (None, "SMALL"):
            return right(self, step)
        if deed == "FULL":
            Objective.loss = fill
        elif deed != "NAN":
            os.kill(os.getpid(), getattr(signal, deed))
            return right(self, step)
        measure = self.objective.loss
        self.objective.loss = lambda *inputs: tuple(float("nan") * part for part in measure(*inputs))
        values = right(self, step)
        self.objective.loss = measure
        return values
    TransformerTrainer.train_step = train_step
    right_loss = Objective.loss
    def fill(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")
    def loss(self, codes, labels, branches=None):
        loss, numbers = right_loss(self, codes, labels, branches)
        if deed == "SMALL" and world.rank == world.size - 1 and len(codes) > 1:
            if len(codes) > 2:
                fill()
            first = next(self.model.blocks[0].parameters())
            hook = first.register_hook(lambda gradient: (hook.remove(), fill()))
        return loss, numbers
    Objective.loss = loss
    def tell(about):
        print(world.rank, type(about).__name__, getattr(about, "message", None), flush=True)
    try:
        with join_world("cpu") as (world, device):
            for name, start, config, deed in jobs:
                if start and world.is_first:
                    shutil.copytree(root / start, root / name)
                    for step in (4, 5):
                        shutil.rmtree(root / name / "checkpoints" / f"step-000000{step}")
                world.wait()
                config = configs.from_dict(TrainConfig, config)
                try:
                    train_transformer(
                        root / "codes", root / name, config, tokenizer=root / "tokenizer", device=device, on_step=tell,
                        on_plan=tell, world=world,
                    )
                except (LostProcessError, MemoryLimitError):
                    raise
                except VarcliError as error:
                    if world.is_first:
                        print("refused", name, error.exit_code, error, flush=True)
    except Exception as error:
        sys.exit(report_error(error))
"""
IN_TWO = [
    ("ddp2", None, {"parallel": "ddp"}, None),
    ("fsdp2", None, {"parallel": "fsdp"}, None),
    ("one to fsdp2", "one", {"parallel": "fsdp"}, None),
    ("stopped", None, {"parallel": "fsdp"}, "SIGTERM"),
    ("dropout2", None, {"parallel": "ddp", "dropout": 0.1}, None),
    ("dropout2 again", "dropout2", {"parallel": "ddp", "dropout": 0.1}, None),
    ("fsdp2 again", "fsdp2", {"parallel": "fsdp"}, None),
    ("spoilt ddp", None, {"parallel": "ddp"}, "NAN"),
    ("spoilt fsdp", None, {"parallel": "fsdp"}, "NAN"),
    ("one host", None, {"parallel": "hsdp"}, None),
    ("bfloat16", None, {"parallel": "fsdp", "precision": "bf16"}, None),
    ("small", None, {"parallel": "ddp", "micro_batch_size": None}, "SMALL"),
]
IN_FOUR = [
    ("ddp4", None, {"parallel": "ddp"}, None),
    ("hsdp4", None, {"parallel": "hsdp"}, None),
    ("fsdp2 to fsdp4", "fsdp2", {"parallel": "fsdp"}, None),
    ("uneven", None, {"batch_size": 6}, None),
    ("ddp2 to other lr", "ddp2", {"learning_rate": 1e-3}, None),
    ("died", None, {"parallel": "ddp"}, "SIGKILL"),
]
FULL = [
    [("full ddp", None, {"parallel": "ddp", "micro_batch_size": 2}, "FULL")],
    [("full fsdp", None, {"parallel": "fsdp", "micro_batch_size": 2}, "FULL")],
    [("small fsdp", None, {"parallel": "fsdp", "micro_batch_size": None}, "SMALL")],
]  # each ends the processes


def describe(root: Path, jobs: list[tuple[str, str | None, dict, str | None]]) -> tuple[str, str]:
    """Arguments of PROGRAM."""
    full = [(name, start, configs.to_dict(replace(CONFIG, **changes)), deed) for name, start, changes, deed in jobs]
    return str(root), json.dumps(full)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Iterator[Path]:
    """Every run of this file, and what the processes said, in said.json."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("varcli.transformer.base._GAMMA_BY_DEPTH", OPEN_GATES)
        yield _run_all(tmp_path_factory.mktemp("ranks"))


def _run_all(root: Path) -> Path:
    torch.manual_seed(0)
    shape = {"width": 32, "channel_multipliers": (1, 1, 1, 1), "num_res_blocks": 1, "num_phis": 2}
    tokenizer = VQVAE(TokenizerConfig(patch_nums=(1, 2, 4), vocab_size=16, code_channels=8, **shape)).eval()
    save_tokenizer(root / "tokenizer", tokenizer)
    write_codes(root / "codes", tokenizer, torch.Generator().manual_seed(0))
    train(root, "one")
    train(root, "whole", replace(CONFIG, micro_batch_size=8))
    train(root, "kept", replace(CONFIG, drop_path=0.0))
    train(root, "named", replace(CONFIG, label_dropout=0.0))
    launches = [(2, 2, describe(root, IN_TWO)), (4, 2, describe(root, IN_FOUR))]
    ended = run_launches(PROGRAM, [*launches, *((2, 2, describe(root, jobs)) for jobs in FULL)])
    shutil.copytree(root / "hsdp4", root / "hsdp4 to one")
    for step in (4, 5):
        shutil.rmtree(root / "hsdp4 to one" / "checkpoints" / f"step-000000{step}")
    train(root, "hsdp4 to one")
    train(root, "stopped")
    (root / "said.json").write_text(json.dumps(ended))
    return root


def train(root: Path, name: str, config: TrainConfig = CONFIG) -> None:
    train_transformer(root / "codes", root / name, config, tokenizer=root / "tokenizer", device="cpu")


def log(root: Path, name: str, key: str, kind: str = "train") -> list[float]:
    return [line[key] for line in read_log(root / name, kind)]


def said(root: Path, launch: int) -> tuple[list[int], str, str]:
    """Exit codes, all of stdout, all of stderr."""
    codes, out, err = zip(*json.loads((root / "said.json").read_text())[launch], strict=True)
    return list(codes), "".join(out), "".join(err)


RUNS = ["whole", "ddp2", "fsdp2", "ddp4", "hsdp4", "small", "stopped", "one to fsdp2", "fsdp2 to fsdp4", "hsdp4 to one"]


@pytest.mark.parametrize("name", RUNS)
def test_one_process_equals_several_however_they_share_and_resume(root, name):
    for key in ("loss", "accuracy", "loss_last", "gradient_norm", "learning_rate"):
        torch.testing.assert_close(log(root, name, key), log(root, "one", key), rtol=1e-5, atol=0, msg=key)
    for key in ("loss", "images"):  # of the averaged weights
        found, expected = (log(root, run, key, "validation") for run in (name, "one"))
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    expected, found = (load_transformer(root / run / "transformer")[0].state_dict() for run in ("one", name))
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, rtol=1e-3, atol=1e-5, msg=key)


def test_these_laws_would_see_what_is_drawn(root):
    for name in ("kept", "named"):
        assert log(root, name, "gradient_norm")[1] != pytest.approx(log(root, "one", "gradient_norm")[1], rel=1e-3)


@pytest.mark.parametrize("name", ["dropout2", "fsdp2"])
def test_as_many_processes_resume_bit_for_bit(root, name):
    for key in ("loss", "gradient_norm"):
        assert log(root, f"{name} again", key) == log(root, name, key)
    files = [path.name for path in list_checkpoints(root / name)[0].glob("*.safetensors")]
    assert files
    for file in files:
        first, again = ((list_checkpoints(root / run)[0] / file).read_bytes() for run in (name, f"{name} again"))
        assert first == again, file


def test_bfloat16_shards_learn_what_float32_learns(root):
    torch.testing.assert_close(log(root, "bfloat16", "loss"), log(root, "one", "loss"), rtol=0.01, atol=0)


def test_each_process_writes_its_own_rows_and_no_more(root):
    manifest = read_manifest(list_checkpoints(root / "fsdp2 to fsdp4")[0], "checkpoint")
    pieces = [
        f"{part}-0000{index}-of-00004.safetensors"
        for part in ("transformer", "optimizer", "ema")
        for index in (1, 2, 3, 4)
    ]
    assert sorted(manifest.files) == sorted([*pieces, "random.safetensors"])
    sizes = [manifest.files[name].size for name in pieces[:4]]
    assert max(sizes) < 1.5 * sum(sizes) / 4
    copies = read_manifest(list_checkpoints(root / "hsdp4")[0], "checkpoint")
    assert sum("-of-00002" in name for name in copies.files) == 6  # each host has all of it, one writes


def test_one_process_speaks_and_what_cannot_be_is_refused_before_anything_is_written(root):
    _, out, _ = said(root, 0)
    assert {line.split()[0] for line in out.splitlines()} == {"0", "refused"}
    assert "refused one host 1 hsdp keeps a copy a host" in out
    _, out, _ = said(root, 1)
    assert "refused uneven 1 a batch of 6 cannot be divided evenly among 4 processes" in out
    assert "learning_rate was 0.003, now 0.001" in out
    assert not (root / "one host" / "config.json").exists() and not (root / "uneven" / "config.json").exists()


def test_a_signal_to_one_process_stops_all_with_the_state_saved(root):
    codes, out, err = said(root, 0)
    assert codes == [0, 0], err
    assert "refused stopped 75 stopped by SIGTERM after step 4 of 5; the state is saved" in out


@pytest.mark.parametrize("name", ["spoilt ddp", "spoilt fsdp"])
def test_a_loss_that_is_no_number_in_one_process_is_skipped_by_all(root, name):
    assert [line["step"] for line in read_log(root / name, "event")] == [4]
    assert [line["step"] for line in read_log(root / name, "train") if "loss" in line] == [1, 2, 3, 5]
    assert log(root, name, "loss", "validation")[-1] == pytest.approx(
        log(root, "one", "loss", "validation")[-1], rel=0.01
    )


def test_another_number_of_processes_is_said(root):
    _, out, _ = said(root, 1)
    assert "going on from step 2 of 5, with 4 processes instead of 2" in out


def test_a_process_that_dies_ends_all_with_one_message(root):
    codes, _, err = said(root, 1)
    assert sorted(codes) == [-signal.SIGKILL, 1, 1, 1], err
    assert err.count("error:") == 1 and "process 3 has ended or cannot be reached, of 4 counted from 0" in err, err
    assert [folder.name for folder in list_checkpoints(root / "died")] == ["step-0000002"]


def test_copies_agree_on_pieces_that_fit_the_smallest_memory(root):
    _, out, _ = said(root, 0)
    small = out[out.index("images at a time do not fit") - 20 :]
    assert [line.split(" ", 2)[2] for line in small.splitlines() if "do not fit" in line] == [
        "4 images at a time do not fit the memory: going on with 2",
        "2 images at a time do not fit the memory: going on with 1",
    ]


@pytest.mark.parametrize("launch", [2, 3, 4])
def test_a_process_out_of_memory_ends_all_with_one_message_and_what_to_change(root, launch):
    codes, _, err = said(root, launch)
    assert codes == [1, 8], err  # and not killed
    assert err.count("error:") == 1 and "process 1 of 2, counted from 0, is out of memory at batch size 8" in err, err
    assert f"--set micro_batch_size={2 if launch == 4 else 1} takes the same batch in smaller pieces" in err
    assert ("--parallel fsdp" in err) == (launch == 2)
    kept = list_checkpoints(root / FULL[launch - 2][0][0])
    assert [folder.name for folder in kept] == ([] if launch == 4 else ["step-0000002"])
