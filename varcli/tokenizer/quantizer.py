"""The multi-scale residual quantizer: a feature map to K token maps, and back.

Each scale encodes what the coarser ones left over: the leftover is shrunk to the scale's side, every vector is
replaced by its nearest code, and the codes, enlarged and passed through phi, join the running reconstruction.
Source: VAR, arXiv:2404.02905, Alg. 1 and 2; details from its released weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varcli.devices import float64_or_best
from varcli.errors import ShapeError
from varcli.kernels import is_launched
from varcli.shapes import check_shape
from varcli.tokenizer.base import TokenizerConfig

# of the kernels' programs, which hold them in registers: more were not timed
_BLENDED_AT_ONCE = 64  # channels
_RESIZED_AT_ONCE = 32  # positions along a side


def assign_phis(num_scales: int, num_phis: int) -> list[int]:
    """Return which phi convolution each of `num_scales` scales uses.

    num_phis: 1 shares one, 0 gives each scale its own, else the phi whose tick is nearest to k / (K - 1).
    For 4 phis and 10 scales two positions are exact ties, so float64 rounding decides and the expression is part of
    the format: it must stay as the released weights were trained with it.
    """
    if num_phis == 1 or num_scales == 1:
        return [0] * num_scales
    count = num_phis or num_scales
    edge = 1 / 3 / count if count == 4 else 1 / 2 / count
    ticks = np.linspace(edge, 1 - edge, count)
    return [int(np.argmin(np.abs(ticks - scale / (num_scales - 1)))) for scale in range(num_scales)]


def resize_weights(side: int, target: int, mode: str) -> Tensor:
    """Return the (target, side) weights of torch's interpolation along one axis, float32. mode: "bicubic" or "area"."""
    # on a real device even if the weights are not yet, so that they can be put in place later
    one_hot = torch.eye(side, device="cpu").view(1, side, side, 1)
    return F.interpolate(one_hot, size=(target, 1), mode=mode).view(side, target).T.contiguous()


def resize(x_BZss: Tensor, weights_ts: Tensor) -> Tensor:
    """Resize square maps (B, Z, s, s) to (B, Z, t, t) by the weights of one axis.

    Two small matrix products in place of `F.interpolate`, whose bicubic kernel leaves most of a GPU idle, whose gradient
    scatters sixteen taps a pixel, and whose area mode takes only divisible sizes on MPS. In float64, so that TF32, where
    it is on, does not round them; MPS has neither.
    """
    dtype = float64_or_best(x_BZss.device)
    weights = weights_ts.to(dtype)
    return (weights @ x_BZss.to(dtype) @ weights.T).to(x_BZss.dtype)


def nearest_rows(vectors_NZ: Tensor, table_VZ: Tensor, by_angle: bool) -> Tensor:
    """Return the int64 index (N,) of the row nearest to each vector, by squared distance or by angle; the first of equals."""
    if by_angle:
        return (F.normalize(vectors_NZ, dim=-1) @ F.normalize(table_VZ, dim=-1).T).argmax(dim=1)
    squares = vectors_NZ.square().sum(dim=1, keepdim=True) + table_VZ.square().sum(dim=1)
    return torch.addmm(squares, vectors_NZ, table_VZ.T, alpha=-2.0).argmin(dim=1)


class MultiScaleQuantizer(nn.Module):
    """Codebook, phi convolutions, and the walk over scales, in float32 whatever autocast says."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.scales = config.scales
        self.vocab_size = config.vocab_size
        self.code_channels = config.code_channels
        self.phi_residual = abs(config.phi_residual)
        self.kernels = "torch"  # or "triton", of varcli.kernels.KERNELS: how `advance` is computed without gradients
        self.cosine_codes = config.cosine_codes
        self.commitment_weight = config.commitment_weight
        self.codebook = nn.Embedding(config.vocab_size, config.code_channels)
        self.phi_of_scale = assign_phis(self.scales.num_scales, config.num_phis)
        num_convs = (config.num_phis or self.scales.num_scales) if self.phi_residual > 1e-6 else 0
        self.phis = nn.ModuleList(
            nn.Conv2d(config.code_channels, config.code_channels, 3, padding=1) for _ in range(num_convs)
        )
        for scale, side in enumerate(self.scales):
            grid_side = self.scales.grid_side
            self.register_buffer(f"_enlarge_{scale}", resize_weights(side, grid_side, "bicubic"), persistent=False)
            self.register_buffer(f"_shrink_{scale}", resize_weights(grid_side, side, "area"), persistent=False)
        # how often each scale uses each code, for the training log; carried along with released weights
        self.register_buffer("usage_KV", torch.zeros(self.scales.num_scales, config.vocab_size))

    # -- codes to features ---------------------------------------------------------------------------------------

    def lookup(self, codes_Bl: Tensor) -> Tensor:
        """Return the code vectors (B, l, Z) of codes in [0, V)."""
        return self.codebook(codes_Bl)

    def phi(self, h_BZhw: Tensor, scale: int) -> Tensor:
        """Blend an enlarged scale with its convolution: (1 - r) h + r conv(h)."""
        if not self.phis:
            return h_BZhw
        convolved = self.phis[self.phi_of_scale[scale]](h_BZhw)
        return h_BZhw * (1 - self.phi_residual) + convolved * self.phi_residual

    def contribution(self, vectors_BlZ: Tensor, scale: int) -> Tensor:
        """Return what the vectors of one scale add to f_hat: (B, l, Z) -> float32 (B, Z, h, w)."""
        with torch.autocast(vectors_BlZ.device.type, enabled=False):
            return self.phi(self._enlarge(vectors_BlZ, scale).contiguous(), scale)

    def _enlarge(self, vectors_BlZ: Tensor, scale: int, resize: Callable[[Tensor, Tensor], Tensor] = resize) -> Tensor:
        batch, _, channels = vectors_BlZ.shape
        side = self.scales.sides[scale]
        h = vectors_BlZ.float().transpose(1, 2).reshape(batch, channels, side, side)
        return h if scale == self.scales.num_scales - 1 else resize(h, self.get_buffer(f"_enlarge_{scale}"))

    def advance(self, f_hat_BZhw: Tensor, vectors_BlZ: Tensor, scale: int) -> tuple[Tensor, Tensor | None]:
        """Add one scale to f_hat, and shrink the sum to what the transformer reads for the next scale.

        Returns (f_hat, features (B, l_next, Z)); the features are None after the last scale.
        """
        if (
            self.kernels == "triton"
            and is_launched(f_hat_BZhw)
            and self.phis
            and self.code_channels <= _BLENDED_AT_ONCE
            and self.scales.grid_side <= _RESIZED_AT_ONCE
        ):
            return self._advance_launched(f_hat_BZhw, vectors_BlZ, scale)
        f_hat_BZhw = f_hat_BZhw + self.contribution(vectors_BlZ, scale)
        return f_hat_BZhw, self._shrink_for_next(f_hat_BZhw, scale)

    def _advance_launched(self, f_hat_BZhw: Tensor, vectors_BlZ: Tensor, scale: int) -> tuple[Tensor, Tensor | None]:
        """Do as `advance` in three launches of Triton's, to float32's rounding."""
        from varcli.kernels.small_maps_triton import launch_blend, launch_resize

        phi = self.phis[self.phi_of_scale[scale]]
        h = self._enlarge(vectors_BlZ, scale, launch_resize)
        f_hat_BZhw = launch_blend(f_hat_BZhw, h, phi.weight.float(), phi.bias.float(), self.phi_residual)
        return f_hat_BZhw, self._shrink_for_next(f_hat_BZhw, scale, launch_resize)

    def _shrink_for_next(
        self, f_hat_BZhw: Tensor, scale: int, resize: Callable[[Tensor, Tensor], Tensor] = resize
    ) -> Tensor | None:
        """Return f_hat at the size of the scale after this one, (B, l_next, Z), or None after the last."""
        if scale == self.scales.num_scales - 1:
            return None
        shrunk = f_hat_BZhw
        if scale + 1 != self.scales.num_scales - 1:
            shrunk = resize(f_hat_BZhw, self.get_buffer(f"_shrink_{scale + 1}"))
        return shrunk.flatten(2).transpose(1, 2)

    def running_f_hat(self, codes_BL: Tensor) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Yield, scale by scale, f_hat (B, Z, h, w) so far and the next scale's features (B, l_next, Z) or None."""
        f_hat = self.empty_f_hat(codes_BL.shape[0], codes_BL.device)
        for scale, codes_Bl in enumerate(self.split(codes_BL)):
            f_hat, features = self.advance(f_hat, self.lookup(codes_Bl), scale)
            yield f_hat, features

    def embed(self, codes_BL: Tensor) -> Tensor:
        """Return the full reconstruction f_hat of all scales, float32 (B, Z, h, w).

        Raises ShapeError if codes are not (B, L) integers.
        """
        return [f_hat for f_hat, _ in self.running_f_hat(codes_BL)][-1]

    def teacher_forcing_input(self, codes_BL: Tensor) -> Tensor:
        """Build the features the transformer reads while learning every scale but the first.

        codes_BL: indices in [0, V), scales concatenated coarse to fine; the last scale's are not used.
        Returns float32 (B, L - l_0, Z); position i is aligned with the code predicted there.
        Raises ShapeError if codes are not (B, L) integers. Source: VAR, arXiv:2404.02905, Sec. 3.2.
        """
        features = [features for _, features in self.running_f_hat(codes_BL) if features is not None]
        if not features:
            return torch.zeros(codes_BL.shape[0], 0, self.code_channels, device=codes_BL.device)
        return torch.cat(features, dim=1)

    def empty_f_hat(self, batch: int, device: torch.device) -> Tensor:
        """Return the zero map (B, Z, h, w) from which f_hat grows."""
        side = self.scales.grid_side
        return torch.zeros(batch, self.code_channels, side, side, device=device)

    def split(self, codes_BL: Tensor) -> tuple[Tensor, ...]:
        """Cut codes of all scales into one (B, l) tensor a scale. Raises ShapeError if L or the dtype is wrong."""
        check_shape("codes", codes_BL, ("B", self.scales.seq_len))
        if codes_BL.dtype not in (torch.int64, torch.int32):
            raise ShapeError(f"codes must be int64 or int32, but are {codes_BL.dtype}")
        return codes_BL.split(self.scales.step_lengths, dim=1)

    # -- features to codes ---------------------------------------------------------------------------------------

    @torch.no_grad()
    def nearest(self, vectors_NZ: Tensor) -> Tensor:
        """Return the int64 index of each vector's code: least squared distance, or least angle with cosine codes."""
        return nearest_rows(vectors_NZ, self.codebook.weight, self.cosine_codes)

    @torch.no_grad()
    def encode(self, f_BZhw: Tensor) -> Tensor:
        """Return the codes (B, L), int64, coarse to fine, of a feature map (B, Z, h, w)."""
        check_shape("features", f_BZhw, ("B", self.code_channels, self.scales.grid_side, self.scales.grid_side))
        with torch.autocast(f_BZhw.device.type, enabled=False):
            return torch.cat([codes for _, codes in self._walk(f_BZhw)], dim=1)

    @torch.no_grad()
    def leftovers(self, f_BZhw: Tensor) -> list[Tensor]:
        """Return, scale by scale, the (B * l, Z) vectors that were matched to codes: what restarted codes are drawn from."""
        with torch.autocast(f_BZhw.device.type, enabled=False):
            return [vectors for vectors, _ in self._walk(f_BZhw)]

    def forward(self, f_BZhw: Tensor, num_kept_B: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Quantize while training.

        num_kept_B: how many of the coarsest scales each image keeps, in [1, K]; None keeps all. Dropping fine scales
        now and then makes the coarse ones carry meaning (quantizer dropout, arXiv:2410.01756).
        Returns (straight-through f_hat (B, Z, h, w), loss, codes (B, L)). The loss is the mean over scales of
        beta * |sg(f_hat) - f|^2 + |f_hat - sg(f)|^2 on the running f_hat, so that every scale's error reaches the
        codes of all coarser scales; f_hat's gradient passes to the encoder alone.
        """
        with torch.autocast(f_BZhw.device.type, enabled=False):
            f = f_BZhw.float()
            f_detached = f.detach()
            f_rest = f_detached
            f_hat = torch.zeros_like(f)
            loss = f.new_zeros(())
            codes = []
            for scale in range(self.scales.num_scales):
                codes.append(self.nearest(self.shrink(f_rest, scale)).view(f.shape[0], -1))
                h = self.contribution(self.lookup(codes[-1]), scale)
                f_rest = f_rest - h.detach()
                f_hat = f_hat + (h if num_kept_B is None else h * (num_kept_B > scale).view(-1, 1, 1, 1))
                loss = loss + self.commitment_weight * F.mse_loss(f_hat.detach(), f) + F.mse_loss(f_hat, f_detached)
            straight_through = f_hat.detach() - f_detached + f
        return straight_through, loss / self.scales.num_scales, torch.cat(codes, dim=1)

    def _walk(self, f_BZhw: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield, scale by scale, the leftover's vectors (B * l, Z) and the codes (B, l) chosen for them."""
        f_rest = f_BZhw.float()
        for scale in range(self.scales.num_scales):
            vectors = self.shrink(f_rest, scale)
            codes = self.nearest(vectors).view(f_rest.shape[0], -1)
            yield vectors, codes
            f_rest = f_rest - self.contribution(self.lookup(codes), scale)

    @torch.no_grad()
    def shrink(self, f_rest_BZhw: Tensor, scale: int) -> Tensor:
        """Shrink what is left over to one scale's side, as (B * l, Z) vectors in row-major order."""
        if scale != self.scales.num_scales - 1:
            f_rest_BZhw = resize(f_rest_BZhw, self.get_buffer(f"_shrink_{scale}"))
        return f_rest_BZhw.permute(0, 2, 3, 1).reshape(-1, self.code_channels)
