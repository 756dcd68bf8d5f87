"""Who a process is in a job: alone without torchrun, and one clear error for variables that make no sense."""

from __future__ import annotations

import pytest
import torch

from varcli.distributed import ALONE, World, join_world
from varcli.errors import ConfigError


@pytest.fixture(autouse=True)
def _no_job(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)


def test_without_torchrun_a_process_is_alone_and_needs_no_group():
    with join_world("cpu") as (world, device):
        assert (world, device) == (ALONE, "cpu") and world.is_first
        assert not torch.distributed.is_initialized()


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


def test_shares_of_a_tensor_come_back_together():
    whole = torch.arange(12).view(6, 2)
    assert torch.equal(torch.cat([World(rank, 3).share(whole) for rank in range(3)]), whole)
