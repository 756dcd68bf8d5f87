"""The patch discriminator that tells reconstructions from images while a tokenizer is trained."""

from __future__ import annotations

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
