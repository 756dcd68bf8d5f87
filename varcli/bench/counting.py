"""Floating-point operations of a tokenizer, counted without computing anything; a multiply and an add count as two."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from varcli.tokenizer import VQVAE, TokenizerConfig


def count_forward(module: nn.Module, run: Callable[[nn.Module], object]) -> float:
    """Operations of `run(module)`: convolutions, matrix products and attention.

    The module is moved to torch's meta device, where tensors have a shape and no values; tensors that `run` makes are there.
    """
    module = module.to("meta")
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        run(module)
    return float(counter.get_total_flops())


def encoder_flops(tokenizer: TokenizerConfig, batch: int = 1) -> float:
    """Pixels to the feature map that is quantized."""
    return count_forward(_shape_of(tokenizer), lambda model: model.features(empty_images(tokenizer, batch)))


def decoder_flops(tokenizer: TokenizerConfig, batch: int = 1) -> float:
    """The quantized feature map to pixels."""
    shape = (batch, tokenizer.code_channels, tokenizer.scales.grid_side, tokenizer.scales.grid_side)
    return count_forward(_shape_of(tokenizer), lambda model: model.decode(torch.empty(shape)))


def distance_flops(tokenizer: TokenizerConfig, batch: int = 1) -> float:
    """Distances of every token to every code."""
    return 2.0 * batch * tokenizer.scales.seq_len * tokenizer.vocab_size * tokenizer.code_channels


def phi_flops(tokenizer: TokenizerConfig, batch: int = 1) -> float:
    """The 3x3 convolution phi at every scale."""
    scales = tokenizer.scales
    return 2.0 * 9 * batch * tokenizer.code_channels**2 * scales.grid_side**2 * scales.num_scales


def encoding_flops(tokenizer: TokenizerConfig) -> float:
    """One image to codes: the encoder as counted, distances to all codes, and phi at every scale."""
    return encoder_flops(tokenizer) + distance_flops(tokenizer) + phi_flops(tokenizer)


def empty_images(tokenizer: TokenizerConfig, batch: int) -> Tensor:
    """Images of the tokenizer's size, (batch, 3, H, W), on torch's default device."""
    return torch.empty(batch, 3, tokenizer.image_size, tokenizer.image_size)


def _shape_of(tokenizer: TokenizerConfig) -> VQVAE:
    with torch.device("meta"):
        return VQVAE(tokenizer)
