"""Blocks: modulation, skipped branches, dropout."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from varcli.transformer import TransformerConfig
from varcli.transformer.blocks import Block, Condition, Stream, modulated_norm

CONFIG = {"width": 8, "num_heads": 2, "step_lengths": (1, 4)}


def test_a_norm_without_modulation_is_a_layer_norm():
    x, zero = torch.randn(2, 3, 8), torch.zeros(2, 1, 8)
    torch.testing.assert_close(modulated_norm(x, zero, zero, 1e-6), F.layer_norm(x, (8,), eps=1e-6))


def test_a_block_with_closed_gates_changes_nothing():
    torch.manual_seed(0)
    block, x = Block(TransformerConfig(**CONFIG)), torch.randn(2, 5, 8)
    modulation = torch.randn(2, 1, 6, 8)
    modulation[:, :, :2] = 0
    assert torch.equal(block(x, modulation, (x.shape[1],)), x)


def test_the_shared_modulation_is_moved_by_the_blocks_own_offset():
    block = Block(TransformerConfig(shared_adaln=True, **CONFIG))
    with torch.no_grad():
        block.modulation_offset.copy_(torch.arange(48.0).view(1, 1, 6, 8))
    shared = torch.randn(2, 1, 6, 8)
    assert torch.equal(
        block.modulate(Condition(torch.randn(2, 8), shared)), shared + torch.arange(48.0).view(1, 1, 6, 8)
    )
    assert not hasattr(block, "modulation")


def test_branches_of_a_sample_are_closed_or_opened_wider():
    torch.manual_seed(0)
    block, x, modulation = Block(TransformerConfig(**CONFIG)), torch.randn(3, 5, 8), torch.randn(3, 1, 6, 8)
    branches_2B = torch.tensor([[0.0, 2.0, 1.0], [0.0, 1.0, 2.0]])
    found = block(x, modulation, (x.shape[1],), branches_2B=branches_2B)
    assert torch.equal(found[0], x[0])
    for sample in (1, 2):
        wider = modulation[sample : sample + 1].clone()
        wider[:, :, :2] *= branches_2B[:, sample, None]
        torch.testing.assert_close(found[sample : sample + 1], block(x[sample : sample + 1], wider, (x.shape[1],)))


def test_dropout_acts_while_training_only():
    torch.manual_seed(0)
    block = Block(TransformerConfig(dropout=0.5, **CONFIG))
    x, modulation = torch.randn(2, 5, 8), torch.randn(2, 1, 6, 8)
    assert torch.equal(block.eval()(x, modulation, (x.shape[1],)), block(x, modulation, (x.shape[1],)))
    assert not torch.equal(block.train()(x, modulation, (x.shape[1],)), block(x, modulation, (x.shape[1],)))


def test_a_stream_drops_out_what_a_tensor_does():
    torch.manual_seed(0)
    block = Block(TransformerConfig(dropout=0.5, **CONFIG)).train()
    x, modulation = torch.randn(2, 5, 8), torch.randn(2, 1, 6, 8)
    for bias in (block.attention.proj.bias, block.feed_forward.fc2.bias):
        torch.nn.init.normal_(bias)
    torch.manual_seed(1)
    expected = block(x, modulation, (1, 4))
    torch.manual_seed(1)
    out = block(Stream(x), modulation, (1, 4))
    assert out.bias_C is None  # where nothing is dropped, whoever adds the branch adds its bias
    torch.testing.assert_close(out.x_BLC + out.gate_B1C * out.branch_BLC, expected)
    assert block.eval()(Stream(x), modulation, (1, 4)).bias_C is not None


def test_what_a_block_leaves_to_the_next_is_no_part_of_its_weights():
    """Law: a sharded block's weights are freed once it returns, so nothing that is still to be used may lie in them."""
    torch.manual_seed(0)
    block = Block(TransformerConfig(**CONFIG))
    modulation = torch.randn(2, 1, 6, 8)
    stream = block(Stream(torch.randn(2, 5, 8)), modulation, (1, 4))
    held = {tensor.untyped_storage().data_ptr() for tensor in (modulation, *block.parameters())}
    assert not held & {tensor.untyped_storage().data_ptr() for tensor in stream}
    assert not any(tensor._is_view() for tensor in (stream.bias_C, stream.gate_B1C))
