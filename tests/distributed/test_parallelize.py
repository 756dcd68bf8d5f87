"""How a model is spread over processes: what is asked for and cannot be. What comes of it: test_transformer_ranks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from varcli.distributed import World
from varcli.distributed.parallelize import gather_whole, is_shard, parallelize
from varcli.errors import ConfigError

CPU = torch.device("cpu")


@pytest.mark.parametrize("mode", ["ddp", "fsdp", "hsdp"])
def test_a_process_alone_calls_the_model_itself(mode):
    model = nn.Linear(2, 1)
    parallel = parallelize(model, [], World(), mode, CPU)
    assert not parallel.is_sharded and parallel.num_shards == 1
    with parallel.accumulating(is_last=False):
        assert parallel(lambda module, x: (module is model, x), 3) == (True, 3)
    weights = dict(model.named_parameters())
    assert not any(map(is_shard, weights.values()))
    assert all(torch.equal(whole, weights[name]) for name, whole in gather_whole(weights, World()).items())


@pytest.mark.parametrize("local_size, size", [(4, 4), (3, 4)])
def test_copies_in_shards_need_several_hosts_of_equally_many(local_size, size):
    with pytest.raises(ConfigError, match="copy a host") as caught:
        parallelize(nn.Linear(2, 1), [], World(0, size, local_size), "hsdp", CPU)
    assert "fsdp" in caught.value.hint


def test_an_unknown_way_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match="parallel mode `zero`") as caught:
        parallelize(nn.Linear(2, 1), [], World(), "zero", CPU)
    assert "hsdp" in caught.value.hint
