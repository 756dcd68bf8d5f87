"""Several processes that train together are measured beside each for itself."""

from __future__ import annotations

import json
from contextlib import nullcontext

import pytest
from ranks import run_ranks
from typer.testing import CliRunner

from varcli.bench.config import BenchConfig
from varcli.bench.stages import run_bench
from varcli.cli.app import app
from varcli.distributed import ALONE, World
from varcli.errors import ConfigError

TOGETHER = """
    import json
    from dataclasses import asdict
    from varcli.bench.config import BenchConfig
    from varcli.bench.stages import run_bench
    from varcli.distributed import join_world
    config = BenchConfig(
        depth=1, scales="1,2", tokenizer_width=32, batch_sizes=(2,), parallel=("ddp", "fsdp"), repeats=1, device="cpu"
    )
    with join_world("cpu") as (world, _):
        result = run_bench("train", config, world=world)
        if world.is_first:
            print(json.dumps([asdict(entry) for entry in result.measurements]))
"""


@pytest.mark.distributed
def test_processes_train_for_themselves_and_then_together():
    first, second = run_ranks(TOGETHER)
    assert (first.code, second.code) == (0, 0), first.err + second.err
    alone, *shared = json.loads(first.out)
    assert (alone["processes"], alone["parallel"]) == (1, None)
    assert [(entry["processes"], entry["parallel"]) for entry in shared] == [(2, "ddp"), (2, "fsdp")]
    for entry in (alone, *shared):
        rate = entry["processes"] * entry["batch_size"] / entry["milliseconds"] * 1e3
        assert entry["images_per_second"] == pytest.approx(rate)
    for entry in shared:
        of_alone = entry["images_per_second"] / 2 / alone["images_per_second"]
        assert entry["details"]["of_alone"] == pytest.approx(of_alone)
        assert entry["details"]["exchange_gb_per_second"] > 0


def test_what_cannot_be_is_refused_before_anything_is_measured(monkeypatch):
    monkeypatch.setattr("varcli.bench.stages.measure_ceiling", lambda *_: pytest.fail("something was measured"))
    two = World(0, 2, 2)
    for modes, world, said in (
        (("zero",), two, "parallel mode `zero`"),
        (("hsdp",), two, "hosts"),
        (("ddp",), ALONE, "one"),
    ):
        with pytest.raises(ConfigError, match=said):
            run_bench("train", BenchConfig(parallel=modes, device="cpu"), world=world)


def test_processes_of_another_stage_are_refused(monkeypatch):
    monkeypatch.setattr("varcli.distributed.join_world", lambda device: nullcontext((World(0, 2, 2), "cpu")))
    for stage in ("sample", "eval"):
        told = CliRunner().invoke(app, ["bench", stage])
        assert told.exit_code == 1 and "stage train" in told.stderr
