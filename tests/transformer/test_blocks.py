"""Blocks: modulation, skipped branches, dropout."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from varcli.transformer import TransformerConfig
from varcli.transformer.blocks import Block, modulated_norm

CONFIG = {"width": 8, "num_heads": 2, "step_lengths": (1, 4)}


def test_a_norm_without_modulation_is_a_layer_norm():
    x, zero = torch.randn(2, 3, 8), torch.zeros(2, 1, 8)
    torch.testing.assert_close(modulated_norm(x, zero, zero, 1e-6), F.layer_norm(x, (8,), eps=1e-6))


def test_a_block_with_closed_gates_changes_nothing():
    torch.manual_seed(0)
    block, x = Block(TransformerConfig(**CONFIG), 0.0), torch.randn(2, 5, 8)
    modulation = torch.randn(2, 1, 6, 8)
    modulation[:, :, :2] = 0
    assert torch.equal(block(x, modulation), x)


def test_the_shared_modulation_is_moved_by_the_blocks_own_offset():
    block = Block(TransformerConfig(shared_adaln=True, **CONFIG), 0.0)
    with torch.no_grad():
        block.modulation_offset.copy_(torch.arange(48.0).view(1, 1, 6, 8))
    shared = torch.randn(2, 1, 6, 8)
    assert torch.equal(block.modulate(torch.randn(2, 8), shared), shared + torch.arange(48.0).view(1, 1, 6, 8))
    assert not hasattr(block, "modulation")


def test_drop_path_skips_whole_samples_and_keeps_the_mean():
    torch.manual_seed(0)
    block = Block(TransformerConfig(**CONFIG), 0.25).train()
    dropped = block._drop(torch.ones(4000, 1, 8))
    by_sample = dropped.flatten(1)
    assert torch.equal(by_sample.amin(dim=1), by_sample.amax(dim=1))
    assert set(by_sample[:, 0].unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert abs(dropped.mean().item() - 1) < 0.03  # four standard errors are 0.037
    assert torch.equal(block.eval()._drop(dropped), dropped)


def test_dropout_acts_while_training_only():
    torch.manual_seed(0)
    block = Block(TransformerConfig(dropout=0.5, **CONFIG), 0.0)
    x, modulation = torch.randn(2, 5, 8), torch.randn(2, 1, 6, 8)
    assert torch.equal(block.eval()(x, modulation), block(x, modulation))
    assert not torch.equal(block.train()(x, modulation), block(x, modulation))
