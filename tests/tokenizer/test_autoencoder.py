"""The encoder and decoder compute the same, however they save memory or time."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from varcli.kernels.conv3x3 import is_gain
from varcli.kernels.group_norm import channel_moments
from varcli.tokenizer import VQVAE, TokenizerConfig
from varcli.tokenizer.autoencoder import AttentionBlock, GroupNorm, ResBlock


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


@pytest.mark.parametrize(
    ("channels_in", "channels", "height", "width"), [(16, 16, 20, 15), (24, 16, 20, 15), (32, 160, 6, 64)]
)
def test_a_fused_block_is_the_same_function_and_knows_its_moments(channels_in, channels, height, width):
    torch.manual_seed(0)
    block = randomized(ResBlock(channels_in, channels, TokenizerConfig(width=8, norm_groups=4)))
    maps = torch.randn(2, channels_in, height, width).to(memory_format=torch.channels_last)
    assert is_gain(channels_in, channels, height, width, maps.device) == (channels == 160)
    with torch.no_grad():
        result, moments_2BC = block.fused_forward(maps, channel_moments(maps))
        torch.testing.assert_close(result, block(maps), rtol=1e-4, atol=1e-4)
        margined = block.margin_forward(maps, channel_moments(maps))
        torch.testing.assert_close(margined, F.pad(block(maps), (0, 1, 0, 1)), rtol=1e-4, atol=1e-4)
        block.dropout.p = 1.0  # the second convolution sees zeros, whichever computes it
        dropped, _ = block.fused_forward(maps, channel_moments(maps))
        torch.testing.assert_close(dropped, block(maps), rtol=1e-4, atol=1e-4)
    assert result.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(moments_2BC, channel_moments(result), rtol=1e-4, atol=1e-4)


def test_the_fused_encoder_and_decoder_are_the_same_functions(tiny_tokenizer):
    torch.manual_seed(0)
    side = tiny_tokenizer.config.image_size
    images = torch.rand(2, 3, side, side) * 2 - 1
    encoder, decoder = randomized(tiny_tokenizer.encoder).eval(), randomized(tiny_tokenizer.decoder).eval()
    with torch.no_grad():
        features = encoder(images)
        torch.testing.assert_close(encoder.fused_forward(images), features, rtol=1e-4, atol=1e-4)
        fused = decoder.conv_out(decoder.fused_blocks(features))
        torch.testing.assert_close(fused, decoder(features), rtol=1e-4, atol=1e-4)


def test_attention_by_products_is_the_same_function():
    torch.manual_seed(0)
    block, maps = randomized(AttentionBlock(48, TokenizerConfig(width=48, norm_groups=4))), torch.randn(2, 48, 5, 6)
    with torch.no_grad():
        expected, block.by_products = block._attend(maps), True
        torch.testing.assert_close(block._attend(maps), expected, rtol=1e-4, atol=1e-4)


def test_attention_by_products_holds_scores_that_are_no_float16_number_before_they_are_scaled():
    torch.manual_seed(0)
    block, maps = randomized(AttentionBlock(64, TokenizerConfig(width=64))), 100 * torch.randn(2, 64, 5, 6)
    with torch.no_grad():
        q, k, _ = block.qkv(maps).flatten(2).transpose(1, 2).chunk(3, dim=-1)
        assert (q @ k.transpose(1, 2)).max() > torch.finfo(torch.float16).max
        block.by_products = True
        assert block.half()._attend(maps.half()).isfinite().all()


def test_a_laid_out_decoder_is_the_same_function_with_equal_weights(tiny_tokenizer):
    torch.manual_seed(0)
    decoder = randomized(tiny_tokenizer.decoder).eval()
    level, width = decoder.levels[0], decoder.conv_out.in_channels
    widths = (level.blocks[0].norm1.num_channels, 160, width)  # with convolutions by an operator of our own
    for index, (before, after) in enumerate(zip(widths, widths[1:])):
        level.blocks[index] = randomized(ResBlock(before, after, tiny_tokenizer.config)).eval()
    weights = {name: value.clone() for name, value in decoder.double().state_dict().items()}
    features = torch.randn(2, tiny_tokenizer.config.code_channels, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        expected = decoder.fused_blocks(features)
        decoder.lay_out(torch.float64)
        torch.testing.assert_close(decoder.fused_blocks(features), expected, rtol=1e-5, atol=1e-5)  # norms are float32
    assert level.blocks[0].packed1 is not None and level.blocks[1].packed1 is None  # to channels that libraries fit
    assert level.blocks[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)
    assert decoder.levels[1].resample.phases.is_contiguous(memory_format=torch.channels_last)
    assert decoder.middle.attention.by_products
    assert all(torch.equal(value, weights.pop(name)) for name, value in decoder.state_dict().items()) and not weights


@pytest.mark.parametrize("batch", [1, 2])
def test_a_compiled_fused_decoder_is_the_same_function_for_one_image_too(tiny_tokenizer, batch):
    """Whether the channels of one image are last can be read from its strides in two ways, of which both must take one."""
    torch.manual_seed(0)
    decoder = randomized(tiny_tokenizer.decoder).eval()
    side = tiny_tokenizer.config.patch_nums[-1]
    features = torch.randn(batch, tiny_tokenizer.config.code_channels, side, side)
    torch.compiler.reset()
    compiled = torch.compile(decoder.fused_blocks, backend="aot_eager", fullgraph=True, dynamic=False)
    with torch.no_grad():
        torch.testing.assert_close(decoder.conv_out(compiled(features)), decoder(features), rtol=1e-4, atol=1e-4)


def test_a_fused_block_in_half_precision_is_as_near_as_a_plain_one():
    torch.manual_seed(0)
    block = randomized(ResBlock(32, 32, TokenizerConfig(width=8, norm_groups=4)))
    maps = torch.randn(2, 32, 16, 16).bfloat16()
    with torch.no_grad():
        exact = block.double()(maps.double())
        block.float()
        with torch.autocast("cpu", torch.bfloat16):
            plain, (fused, _) = block(maps), block.fused_forward(maps, channel_moments(maps))
    assert fused.dtype == torch.bfloat16
    assert (fused.double() - exact).norm() < 1.1 * (plain.double() - exact).norm()


def randomized(module: torch.nn.Module) -> torch.nn.Module:
    """The module with norms and biases that are not at their start."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim == 1:
                parameter.normal_()
    return module


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
