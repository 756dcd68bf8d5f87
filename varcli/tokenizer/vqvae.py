"""The tokenizer of VAR: convolutional autoencoder around a multi-scale residual quantizer."""

from __future__ import annotations

import hashlib
import json

import torch
from torch import Tensor, nn

from varcli import config as configs
from varcli.errors import ConfigError, ShapeError
from varcli.shapes import check_shape
from varcli.tokenizer.autoencoder import Decoder, Encoder, init_weights
from varcli.tokenizer.base import TokenizerConfig
from varcli.tokenizer.convolutions import Upsample
from varcli.tokenizer.quantizer import MultiScaleQuantizer


class VQVAE(nn.Module):
    """Images (B, 3, H, W) in [-1, 1] to codes (B, L) and back. Source: VAR, arXiv:2404.02905, Sec. 3.2."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.config = config
        kernel = config.quant_conv_kernel
        self.encoder = Encoder(config)
        self.pre_conv = nn.Conv2d(config.code_channels, config.code_channels, kernel, padding=kernel // 2)
        self.quantizer = MultiScaleQuantizer(config)
        self.post_conv = nn.Conv2d(config.code_channels, config.code_channels, kernel, padding=kernel // 2)
        self.decoder = Decoder(config)
        for part in (self.encoder, self.decoder, self.pre_conv, self.post_conv):
            init_weights(part)
        self.is_decoder_rounded = False  # by `keep_decoder_in`

    def features(self, images_B3HW: Tensor) -> Tensor:
        """Return the feature map f (B, Z, h, w) that the quantizer encodes.

        Raises ShapeError unless images are floats of the config's size.
        """
        side = self.config.image_size
        check_shape("images", images_B3HW, ("B", 3, side, side))
        if not images_B3HW.is_floating_point():
            raise ShapeError(f"images must be floats in [-1, 1], but are {images_B3HW.dtype}")
        return self.pre_conv(self.encoder(images_B3HW))

    def encode(self, images_B3HW: Tensor) -> Tensor:
        """Return the int64 codes (B, L), coarse to fine, of images in [-1, 1]."""
        return self.quantizer.encode(self.features(images_B3HW))

    def decode(self, f_hat_BZhw: Tensor) -> Tensor:
        """Return the images (B, 3, H, W) of feature maps, clamped to [-1, 1]."""
        return self.decode_raw(f_hat_BZhw).clamp(-1, 1)

    def decode_raw(self, f_hat_BZhw: Tensor) -> Tensor:
        """Return the decoder's images without the clamp, as training needs them."""
        dtype, device = self.post_conv.weight.dtype, f_hat_BZhw.device
        if not self.is_decoder_rounded or torch.is_autocast_enabled(device.type):
            return self.decoder(self.post_conv(f_hat_BZhw))
        with torch.autocast(device.type, dtype):
            return self.decoder(self.post_conv(f_hat_BZhw))

    def forward(self, images_B3HW: Tensor, num_kept_B: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Training pass: (reconstruction (B, 3, H, W) not clamped, quantizer loss, codes (B, L)).

        num_kept_B: see `MultiScaleQuantizer.forward`.
        """
        f_hat, loss, codes_BL = self.quantizer(self.features(images_B3HW), num_kept_B)
        return self.decode_raw(f_hat), loss, codes_BL

    def keep_decoder_in(self, dtype: torch.dtype) -> None:
        """Keep the weights of the decoder's convolutions in half precision: what autocast computes, without its copies.

        Those of `Upsample` stay float32, since they are added up before they are rounded. Does nothing for float32. From then
        on the tokenizer is neither saved nor known by a fingerprint.
        """
        if dtype == torch.float32:
            return
        self.is_decoder_rounded = True
        modules = [self.post_conv, *self.decoder.modules()]
        left_out = [module.conv for module in modules if isinstance(module, Upsample)]
        for module in modules:
            if isinstance(module, nn.Conv2d) and module not in left_out:
                module.weight.data = module.weight.data.to(dtype)

    @torch.no_grad()
    def fingerprint(self) -> str:
        """Return sixteen hex digits of the SHA-256 over config and weights; usage counts are left out.

        Raises ConfigError if `keep_decoder_in` has rounded some of them.
        """
        if self.is_decoder_rounded:
            raise ConfigError(
                "a tokenizer whose decoder was rounded has no fingerprint",
                "load it anew, or use Generator.tokenizer_fingerprint",
            )
        digest = hashlib.sha256(json.dumps(configs.to_dict(self.config), sort_keys=True).encode())
        for name, tensor in sorted(self.state_dict().items()):
            if name != "quantizer.usage_KV":
                digest.update(f"{name}{tuple(tensor.shape)}".encode())
                digest.update(tensor.detach().float().cpu().contiguous().numpy())
        return digest.hexdigest()[:16]
