"""The patch discriminator that tells reconstructions from images while a tokenizer is trained."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm


class PatchDiscriminator(nn.Module):
    """Images (B, 3, H, W) to one logit a patch (B, 1, H/2^layers, W/2^layers).

    Source: PatchGAN (arXiv:1611.07004) with spectral norm (arXiv:1802.05957) in place of batch norm, so that a logit
    depends on its own image alone.
    """

    def __init__(self, width: int = 64, num_layers: int = 3) -> None:
        super().__init__()
        channels = [3] + [min(width * 2**layer, 512) for layer in range(num_layers)]
        self.convs = nn.ModuleList(
            spectral_norm(nn.Conv2d(a, b, 4, stride=2, padding=1)) for a, b in zip(channels, channels[1:], strict=False)
        )
        self.conv_mid = spectral_norm(nn.Conv2d(channels[-1], channels[-1], 3, padding=1))
        self.conv_out = spectral_norm(nn.Conv2d(channels[-1], 1, 3, padding=1))
        self.activation = nn.LeakyReLU(0.2)

    def forward(self, images: Tensor) -> Tensor:
        """Judge images in [-1, 1]."""
        x = images
        for conv in self.convs:
            x = self.activation(conv(x))
        return self.conv_out(self.activation(self.conv_mid(x)))


def augment_pair(real: Tensor, fake: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """Shift brightness, contrast and position of images and reconstructions alike, differentiably.

    The same random change for both of a pair, so that a discriminator of a small set cannot learn its images by heart
    (arXiv:2006.10738). (B, 3, H, W) in, (B, 3, H, W) out.
    """
    batch, _, height, width = real.shape

    def uniform(low: float, high: float) -> Tensor:
        return torch.empty(batch, 1, 1, 1, device=real.device).uniform_(low, high, generator=generator)

    brightness, contrast = uniform(-0.2, 0.2), uniform(0.8, 1.2)
    reach = max(height // 8, 1)
    rows, columns = (uniform(-reach, reach).round().long().view(batch, 1) for _ in range(2))
    row_index = (torch.arange(height, device=real.device) + rows).clamp(0, height - 1)
    column_index = (torch.arange(width, device=real.device) + columns).clamp(0, width - 1)
    picks = torch.arange(batch, device=real.device).view(batch, 1, 1)

    def change(images: Tensor) -> Tensor:
        moved = images.permute(0, 2, 3, 1)[picks, row_index.unsqueeze(2), column_index.unsqueeze(1)].permute(0, 3, 1, 2)
        middle = moved.mean(dim=(1, 2, 3), keepdim=True)
        return (moved - middle) * contrast + middle + brightness

    return change(real), change(fake)
