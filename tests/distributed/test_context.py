"""Who a process is in a job: alone without torchrun, and one clear error for variables that make no sense."""

from __future__ import annotations

import signal
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
from ranks import run_ranks

from varcli.distributed import ALONE, World, context, join_world
from varcli.distributed.context import exchange, have_own_gpus
from varcli.errors import ConfigError, LostProcessError


@pytest.fixture(autouse=True)
def _no_job(monkeypatch):
    for name in (
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "LOCAL_WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
        "VARCLI_TIMEOUT",
    ):
        monkeypatch.delenv(name, raising=False)


def test_without_torchrun_a_process_is_alone_and_needs_no_group():
    with join_world("cpu") as (world, device):
        assert (world, device) == (ALONE, "cpu") and world.is_first
        assert not torch.distributed.is_initialized()


WAITING = """
    import os, signal, sys
    from varcli.cli.app import report_error
    from varcli.distributed import join_world
    os.environ["VARCLI_TIMEOUT"] = "0.05"
    try:
        with join_world("cpu") as (world, device):
            world.wait()
            if world.rank == 1:
                os.kill(os.getpid(), signal.SIGSTOP)
            world.wait()
    except Exception as error:
        sys.exit(report_error(error))
"""


@pytest.mark.distributed
def test_a_process_that_hangs_ends_all_with_its_number():
    first, stopped, last = run_ranks(WAITING, size=3)
    assert stopped.code == -signal.SIGKILL  # by the test, as torchrun would
    assert (first.code, last.code) == (1, 1)
    text = first.err + last.err
    assert text.count("error:") == 1 and "process 1 has ended or cannot be reached, of 3 counted from 0" in text, text


@pytest.mark.distributed
@pytest.mark.parametrize("late", [0, 1])
def test_an_error_is_told_once_though_another_process_is_still_joining(late):
    program = f"""
        import os, time
        import torch.distributed as dist
        from varcli.distributed import join_world

        join = dist.init_process_group
        def join_late(*arguments, store, **options):
            join(*arguments, store=store, **options)
            time.sleep(2)
            store.add("late", 1)  # as joining asks the store, to its end
        if os.environ["RANK"] == "{late}":
            dist.init_process_group = join_late
        try:
            with join_world("cpu"):
                raise ValueError("wrong")
        except Exception as error:
            print(error)
            raise SystemExit(1)
    """
    ended = run_ranks(program)
    assert [process.code for process in ended] == [1, 1], ended
    assert "".join(process.out for process in ended) == "wrong\n", ended


@pytest.mark.parametrize("value", ["soon", "0", "-1", "nan"])
def test_a_timeout_that_makes_no_sense_is_one_error(monkeypatch, value):
    monkeypatch.setenv("VARCLI_TIMEOUT", value)
    with pytest.raises(ConfigError, match="VARCLI_TIMEOUT"), join_world("cpu"):
        pass


@pytest.mark.parametrize("values", [{"RANK": "x"}, {"WORLD_SIZE": "2.5"}, {"WORLD_SIZE": "2", "RANK": "0"}])
def test_variables_that_make_no_sense_are_one_error(monkeypatch, values):
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError) as caught, join_world("cpu"):
        pass
    assert caught.value.hint == "start with torchrun"


def test_an_error_of_a_lonely_process_passes_through():
    with pytest.raises(ConfigError, match="mine"), join_world("cpu"):
        raise ConfigError("mine")


def test_a_failed_exchange_is_a_lost_process_but_not_where_memory_ran_out():
    lost = torch.distributed.DistBackendError("NCCL error: remote process exited or there was a network error")
    full = torch.distributed.DistBackendError(
        "NCCL error: unhandled cuda error. Last error: Cuda failure 2 'out of memory'"
    )
    for and_more in (False, True):
        with pytest.raises(LostProcessError, match="another process"), exchange(and_more):
            raise lost
        with pytest.raises(RuntimeError) as caught, exchange(and_more):
            raise full
        assert caught.value is full


def test_shares_of_a_tensor_come_back_together():
    whole = torch.arange(12).view(6, 2)
    assert torch.equal(torch.cat([World(rank, 3).share(whole) for rank in range(3)]), whole)


@pytest.mark.parametrize(
    ("gpus", "own"), [(["a", "b", "c"], True), (["a", "a", "b"], False), (["a", None, "b"], False), ([None] * 3, False)]
)
def test_gpus_are_ones_own_where_their_names_differ(gpus, own, monkeypatch):
    """However many a process sees: schedulers may show each one GPU alone, and two processes may share one."""
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    store, patience = torch.distributed.HashStore(), timedelta(seconds=10)
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(lambda gpu: have_own_gpus(store, gpu, 3, patience), gpus)) == [own] * 3


def test_gpus_of_a_process_that_never_starts_are_not_waited_for_without_end():
    with pytest.raises(RuntimeError, match="timed out"):
        have_own_gpus(torch.distributed.HashStore(), None, 2, timedelta(seconds=0.1))


def test_processes_that_wait_for_a_late_one_ask_less_and_less_often(monkeypatch):
    """The one store serves them all: half a minute costs it a hundred questions a process at most."""
    store, clock, pauses = torch.distributed.HashStore(), [0.0], []

    def sleep(seconds: float) -> None:
        clock[0] += seconds
        pauses.append(seconds)
        if clock[0] > 30 and not store.check(["varcli/complete"]):
            assert have_own_gpus(store, None, 2, timedelta(minutes=1)) is False  # the late one finds all there

    monkeypatch.setattr(context, "time", SimpleNamespace(sleep=sleep, monotonic=lambda: clock[0]))
    assert have_own_gpus(store, None, 2, timedelta(minutes=1)) is False
    assert pauses[0] < 0.05 and pauses == sorted(pauses) and max(pauses) == 0.5
    assert len(pauses) < 100
