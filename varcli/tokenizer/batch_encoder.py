"""Batches of pixels to codes on one device: exactly in float32, or as fast as the device can in half precision."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from varcli.devices import autocast, exact_convolutions, try_compiled
from varcli.kernels.conv3x3 import introduce
from varcli.tokenizer.base import TokenizerConfig
from varcli.tokenizer.vqvae import VQVAE

_INDEX_LIMIT = 2**31  # elements of a tensor, beyond which a GPU computes with indices of 64 bits
_MOST_AT_ONCE = 256


def default_batch_size(config: TokenizerConfig, device: torch.device) -> int:
    """Return how many images to encode at once: as many as keep a GPU busy, or a processor's cache useful.

    On CUDA no activation gets more elements than indices of 32 bits can name: 128 images of 256 px with the released width.
    """
    if device.type != "cuda":
        return 64
    fitting = max(1, (_INDEX_LIMIT - 1) // (config.width * config.image_size**2))
    return min(_MOST_AT_ONCE, 1 << (fitting.bit_length() - 1))


def pixels_to_floats(images_u8: Tensor) -> Tensor:
    """Bytes to floats in [-1, 1]."""
    return images_u8.float() / 127.5 - 1


@dataclass(frozen=True)
class CodesOnTheWay:
    """Codes that the device may still be computing; `wait` takes them when they are there."""

    codes: Tensor  # on the host, int64 (B, L)
    arrival: torch.cuda.Event | None = None  # None if they have arrived

    def wait(self) -> Tensor:
        """Return the codes (B, L), int64, on the host; any thread may wait for them."""
        if self.arrival is not None:
            self.arrival.synchronize()
        return self.codes


class BatchEncoder:
    """Turns uint8 images (B, 3, H, W) into codes (B, L).

    In float32 the encoder computes without TF32 and with kernels that are the same each time: the codes that all others
    are compared with. In bf16 and fp16 a copy of the encoder computes in autocast, on CUDA with channels last, compiled if
    wanted; there the quantizer still computes in float32 without TF32, distances as one matrix product a scale, and batches
    are filled up to one size, so that one compiled program serves all of them and an image's codes do not depend on its
    neighbours.

    model: on the device, in eval mode; it is left as it is. dtype: of the encoder. batch_size: images at a time, at most.
    on_failure: told why torch.compile has to be left out, where it does not work here; None makes that an error.
    """

    def __init__(
        self,
        model: VQVAE,
        dtype: torch.dtype,
        batch_size: int,
        is_compiled: bool = False,
        on_failure: Callable[[str], None] | None = None,
    ) -> None:
        self.model = model
        self.dtype = dtype
        self.batch_size = batch_size
        self.device = next(model.parameters()).device
        self.is_exact = dtype == torch.float32
        self.is_compiled = is_compiled and not self.is_exact
        self._on_failure = on_failure
        # tensor cores convolve channels-last maps as they are; torch's group norm on a CPU rounds more in that layout
        layout = torch.channels_last if self.device.type == "cuda" else torch.contiguous_format
        self._fast = None if self.is_exact else _FastPath(model, layout)
        if self.is_compiled and self.device.type == "cuda":
            introduce()
        self._run = torch.compile(self._fast, dynamic=False) if self.is_compiled else self._fast

    @torch.no_grad()
    def encode(self, images_u8: Tensor) -> Tensor:
        """Return the codes (B, L), int64, on the device, which computes while the caller goes on."""
        images = images_u8.to(self.device, non_blocking=True)
        if self._run is None:
            with exact_convolutions():
                return self.model.encode(pixels_to_floats(images))
        count = len(images)
        if count < self.batch_size:
            filled = images.new_zeros(self.batch_size, *images.shape[1:])
            filled[:count] = images
            images = filled
        found: list[Tensor] = []

        def run() -> None:
            with exact_convolutions(), autocast(self.device, self.dtype):
                found.append(self._run(images)[:count])

        if self.is_compiled and self._on_failure is not None:
            self.is_compiled = try_compiled(run, self._uncompile, self._on_failure, is_optional=True)
        else:
            run()
        return found[0]

    def _uncompile(self) -> None:
        self._run = self._fast

    def begin(self, images_u8: Tensor) -> CodesOnTheWay:
        """Encode a batch without waiting for the device: the codes come to the host by themselves."""
        codes_BL = self.encode(images_u8)
        if self.device.type != "cuda":
            return CodesOnTheWay(codes_BL.cpu())
        host = torch.empty(codes_BL.shape, dtype=codes_BL.dtype, pin_memory=True)
        host.copy_(codes_BL, non_blocking=True)
        arrival = torch.cuda.Event(blocking=True)  # whoever waits leaves the core to the decoders
        arrival.record()
        return CodesOnTheWay(host, arrival)


class _FastPath(nn.Module):
    """The encoder's half of a tokenizer, on its own so that its layout can be another."""

    def __init__(self, model: VQVAE, layout: torch.memory_format) -> None:
        super().__init__()
        self.layout = layout
        self.encoder, self.pre_conv, self.quantizer = (
            copy.deepcopy(part).to(memory_format=layout) for part in (model.encoder, model.pre_conv, model.quantizer)
        )

    def forward(self, images_u8: Tensor) -> Tensor:
        """Bytes (B, 3, H, W) to codes (B, L); the caller chooses the precision by autocast."""
        pixels = pixels_to_floats(images_u8).contiguous(memory_format=self.layout)
        return self.quantizer.encode(self.pre_conv(self.encoder(pixels)))
