"""Checkpointing computes the same gradients with less memory."""

from __future__ import annotations

import pytest
import torch

from varcli.tokenizer import VQVAE


def gradients(tokenizer: VQVAE, checkpointing: bool) -> tuple[list[torch.Tensor], int]:
    """Gradients of every parameter, and the bytes of activations kept for them."""
    tokenizer.encoder.checkpointing = tokenizer.decoder.checkpointing = checkpointing
    tokenizer.zero_grad()
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(2)) * 2 - 1
    torch.manual_seed(7)  # of dropout
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        reconstructions, loss, _ = tokenizer(images)
        size = sum(kept.values())
    (reconstructions.square().mean() + loss).backward()
    return [parameter.grad.clone() for parameter in tokenizer.parameters()], size


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpointing_gives_the_same_gradients_and_keeps_less(tiny_tokenizer, dropout):
    tiny_tokenizer.train()
    for module in tiny_tokenizer.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = dropout
    plain, all_bytes = gradients(tiny_tokenizer, checkpointing=False)
    checkpointed, fewer_bytes = gradients(tiny_tokenizer, checkpointing=True)
    for expected, found in zip(plain, checkpointed, strict=True):
        assert torch.equal(expected, found)
    assert fewer_bytes < 0.6 * all_bytes
