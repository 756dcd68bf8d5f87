"""How a model is spread over processes: what is asked for and cannot be. What comes of it: test_transformer_ranks."""

from __future__ import annotations

import pytest
import torch
from ranks import run_ranks
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


# the number of graphs that torch.compile makes of a model whose blocks are larger than what copies exchange first
COMPILED = """
    import sys
    import torch
    from varcli.distributed import join_world, parallelize
    from varcli.order import ScaleOrder
    from varcli.tokenizer import TokenizerConfig
    from varcli.tokenizer.quantizer import MultiScaleQuantizer
    from varcli.training.objective import Objective
    from varcli.transformer import Transformer, TransformerConfig
    graphs = []
    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward
    torch.compile, compile_ = lambda *given, **keys: compile_(*given, **{**keys, "backend": backend}), torch.compile
    torch.manual_seed(0)
    quantizer = MultiScaleQuantizer(TokenizerConfig(patch_nums=(1, 2, 4), vocab_size=16, code_channels=4))
    shape = TransformerConfig(
        width=256, num_heads=4, depth=3, step_lengths=(1, 4, 16), num_classes=3, vocab_size=16, code_channels=4
    )
    with join_world("cpu") as (world, device):
        model = Transformer(shape)
        parallel = parallelize.parallelize(model, model.blocks, world, "ddp", torch.device("cpu"))
        objective = Objective(model, ScaleOrder(quantizer), torch.device("cpu"), torch.float32, parallel=parallel)
        objective.compile()
        codes, labels = torch.zeros(2, 21, dtype=torch.long), torch.zeros(2, dtype=torch.long)
        objective.loss(codes, labels)[0].backward()
        if world.is_first:
            print(len(graphs))
"""


@pytest.mark.distributed
def test_copies_compile_one_block_for_all_though_it_fills_several_buckets():
    first, _ = run_ranks(COMPILED)
    assert first.code == 0, first.err
    assert int(first.out) == 4  # the order's input, what comes before the blocks, a block, the head
