"""The autoencoder's convolutions, and other ways to the same sums that tensor cores are faster at."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varcli.kernels.group_norm import add_residual, interleave_phases

_CHANNEL_MULTIPLE = 8  # of half-precision convolutions and products on tensor cores


def is_half(x: Tensor) -> bool:
    """Whether convolutions of `x` on CUDA are computed in half precision."""
    if x.dtype == torch.float32:
        return torch.is_autocast_enabled("cuda")  # which leaves float64 as it is
    return x.dtype in (torch.float16, torch.bfloat16)


def conv3x3(in_channels: int, out_channels: int) -> nn.Conv2d:
    """A 3x3 convolution that keeps the side."""
    return nn.Conv2d(in_channels, out_channels, 3, padding=1)


class ImageConv2d(nn.Conv2d):
    """A 3x3 convolution from an image's three channels or to them, that keeps the side.

    Tensor cores take multiples of 8 channels, and the kernels for the rest are several times slower. So in half precision
    on a GPU it adds channels of zeros to an image that comes in, and makes one that goes out of matrix products; that one
    is then float32.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, h, w) -> (B, out, h, w)."""
        if not (x.is_cuda and is_half(x)):
            return super().forward(x)
        return self.tapwise_forward(x) if self.out_channels < self.in_channels else self.padded_forward(x)

    def padded_forward(self, x: Tensor) -> Tensor:
        """Compute the same with more channels."""
        more_in, more_out = -self.in_channels % _CHANNEL_MULTIPLE, -self.out_channels % _CHANNEL_MULTIPLE
        weight = F.pad(self.weight, (0, 0, 0, 0, 0, more_in, 0, more_out))
        y = F.conv2d(F.pad(x, (0, 0, 0, 0, 0, more_in)), weight, F.pad(self.bias, (0, more_out)), padding=1)
        return y[:, : self.out_channels]

    def gathered_forward(self, x: Tensor) -> Tensor:
        """Compute the same as one matrix product of what each pixel sees: worth its copies where few channels come in."""
        seen = F.pad(x, (1, 1, 1, 1)).unfold(2, 3, 1).unfold(3, 3, 1).permute(0, 2, 3, 1, 4, 5).flatten(3)
        more = -seen.shape[3] % _CHANNEL_MULTIPLE
        return F.linear(F.pad(seen, (0, more)), F.pad(self.weight.flatten(1), (0, more)), self.bias).permute(0, 3, 1, 2)

    def tapwise_forward(self, x: Tensor) -> Tensor:
        """Compute the same as one matrix product, that reads `x` once, and a sum of its nine parts, each shifted.

        In half precision the product's terms are rounded, and their sum is not: float32 comes out. That is as near as a
        convolution whose result is rounded.
        """
        height, width = x.shape[-2:]
        weight = self.weight.permute(2, 3, 0, 1).flatten(0, 2)  # (9 * out, in), the taps row by row
        weight = F.pad(weight, (0, 0, 0, -len(weight) % _CHANNEL_MULTIPLE))
        terms = F.linear(x.permute(0, 2, 3, 1), weight).permute(0, 3, 1, 2)
        wide = torch.promote_types(terms.dtype, torch.float32)
        terms = F.pad(terms[:, : 9 * self.out_channels].to(wide), (1, 1, 1, 1))
        y = self.bias[:, None, None]
        for tap, part in enumerate(terms.split(self.out_channels, dim=1)):
            row, column = divmod(tap, 3)
            y = y + part[..., row : row + height, column : column + width]
        return y


class Downsample(nn.Module):
    """Halve the side: zeros on the right and bottom only, then a strided 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, h/2, w/2)."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))

    def fused_forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the same from maps (B, C, h + 1, w + 1) that have their zeros, and its moments."""
        return add_residual(F.conv2d(x, self.conv.weight, stride=2), None, self.conv.bias)


class Upsample(nn.Module):
    """Double the side: nearest neighbour, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = conv3x3(channels, channels)
        self.register_buffer("phases", None, persistent=False)  # what `keep_phases_in` made

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, 2h, 2w)."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))

    def fused_forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the same from `x` as it is, with 4/9 of the products, and its moments.

        The three rows that a pixel sees are two of `x`: an even row sees the one before and its own, an odd one its own and
        the one after. So the even and odd rows and columns are four convolutions of 2x2 taps, in which the weights of taps
        that fall on one pixel are added up. They are computed as one, in all places where its taps touch `x`; odd rows and
        columns begin one place later there than even ones.
        """
        phases = self._weight_of_phases() if self.phases is None else self.phases
        return interleave_phases(F.conv2d(x, phases, padding=1), self.conv.bias)

    @torch.no_grad()
    def keep_phases_in(self, dtype: torch.dtype) -> None:
        """Add up the weights for `fused_forward` once and keep the sums: only for weights that do not change any more."""
        self.phases = self._weight_of_phases().to(dtype, memory_format=torch.channels_last)

    def _weight_of_phases(self) -> Tensor:
        """The weights (4 * out, in, 2, 2) by row phase, column phase and output; float32 sums, rounded once.

        With zeros around them, the sums of neighbouring taps are by turns one of even and one of odd rows.
        """
        weight = self.conv.weight
        sums = F.pad(weight.to(torch.promote_types(weight.dtype, torch.float32)), (1, 1, 1, 1))
        sums = sums[:, :, :-1] + sums[:, :, 1:]
        sums = sums[..., :-1] + sums[..., 1:]
        by_phase = sums.unflatten(3, (2, 2)).unflatten(2, (2, 2)).permute(3, 5, 0, 1, 2, 4)
        return by_phase.flatten(0, 2).to(weight.dtype)
