"""Several processes that train together are measured beside each for itself."""

from __future__ import annotations

import json

import pytest
from ranks import run_ranks

from varcli.bench.config import BenchConfig
from varcli.bench.stages import run_bench
from varcli.distributed import World
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


def test_what_processes_do_not_do_together_is_refused():
    with pytest.raises(ConfigError, match="sample"):
        run_bench("sample", world=World(0, 2, 2))
    with pytest.raises(ConfigError, match="parallel mode `zero`"):
        BenchConfig(parallel=("zero",))
