"""The encoder and decoder compute the same, however they save memory or time."""

from __future__ import annotations

import pytest
import torch

from varcli.tokenizer import VQVAE, TokenizerConfig
from varcli.tokenizer.autoencoder import GroupNorm


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


def test_a_group_norm_from_channel_sums_is_the_same_function_with_the_same_gradients():
    norm = GroupNorm(64, TokenizerConfig())
    torch.manual_seed(0)
    with torch.no_grad():
        norm.weight.normal_()
        norm.bias.normal_()
    maps = (torch.randn(3, 64, 8, 8) * 2 + 5).requires_grad_()
    cotangent = torch.randn(3, 64, 8, 8)
    plain, by_channel = norm(maps), norm.channelwise_forward(maps)
    torch.testing.assert_close(by_channel, plain, rtol=1e-4, atol=1e-4)
    wanted = (maps, norm.weight, norm.bias)
    for expected, found in zip(
        torch.autograd.grad(plain, wanted, cotangent), torch.autograd.grad(by_channel, wanted, cotangent), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_a_constant_map_is_normalised_to_the_bias_by_either_way():
    norm = GroupNorm(64, TokenizerConfig())
    constant = torch.full((1, 64, 4, 4), 300.0)
    assert norm.channelwise_forward(constant).abs().max() < 1e-2 and norm(constant).abs().max() < 1e-2


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_compiled_half_precision_computes_what_eager_float32_does(tiny_tokenizer, dtype):
    tokenizer = tiny_tokenizer.cuda().to(memory_format=torch.channels_last).eval()
    side = tokenizer.config.image_size
    images = torch.rand(3, 3, side, side, device="cuda") * 2 - 1
    with torch.no_grad():
        features = tokenizer.encoder(images)
        for part, given in ((tokenizer.encoder, images), (tokenizer.decoder, features)):
            expected = part(given)
            for call in (part, torch.compile(part)):
                with torch.autocast("cuda", dtype):
                    found = call(given)
                assert (found.float() - expected).norm() < 0.05 * expected.norm()
