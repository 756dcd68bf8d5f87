"""EfficientNet-lite0, trained on ImageNet: image features for losses and metrics that need no download.

Architecture: EfficientNet (arXiv:1905.11946) in its "lite" variant: ReLU6, no squeeze-and-excitation. Batch norms are
folded into the convolutions, since the network is never trained here. Where the weights come from stands in
`embedded/lite0/LITE0.md`; `examples/convert_lite0.py` makes them.
"""

from __future__ import annotations

from importlib.resources import as_file, files

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varcli.artifacts.verify import read_checked_tensors, read_manifest
from varcli.artifacts.weights import load_state
from varcli.errors import ConfigError
from varcli.shapes import check_shape

KIND = "features"
WEIGHTS_NAME = "weights.safetensors"
NUM_FEATURES, NUM_CLASSES = 1280, 1000
STAGE_CHANNELS = (16, 24, 40, 112, 320)
"""Channels of the maps that `Lite0.stages` returns, at 1/2, 1/4, 1/8, 1/16 and 1/32 of the side."""

# blocks, kernel, stride, expansion, output channels; arXiv:1905.11946, Table 1
_GROUPS = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
_STAGE_ENDS = (0, 2, 4, 10, 15)  # the last block before each halving, and the last of all
_STEM_CHANNELS = 32
_REDUCTION = 32  # input pixels an output position


class Convolution(nn.Module):
    """A convolution with TensorFlow's "same" padding, then ReLU6 unless it is linear."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1, linear: bool = False
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, groups=groups)
        self.linear = linear
        # sides are even wherever the stride is 2; the odd pixel of padding then stands right and below
        total = kernel - stride
        self.padding = (total // 2, total - total // 2) * 2

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(F.pad(x, self.padding) if any(self.padding) else x)
        return x if self.linear else F.relu6(x)


class InvertedResidual(nn.Module):
    """Widen, filter each channel by itself, narrow without activation; add the input where shapes allow (MobileNet v2)."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        width = inputs * expansion
        self.expand = Convolution(inputs, width) if expansion > 1 else nn.Identity()
        self.depthwise = Convolution(width, width, kernel, stride, groups=width)
        self.project = Convolution(width, outputs, linear=True)
        self.has_skip = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(self.depthwise(self.expand(x)))
        return x + y if self.has_skip else y


class Lite0(nn.Module):
    """EfficientNet-lite0. Build it with `load_lite0`; a fresh one has random weights."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = Convolution(3, _STEM_CHANNELS, 3, 2)
        blocks, channels = [], _STEM_CHANNELS
        for repeats, kernel, stride, expansion, outputs in _GROUPS:
            for number in range(repeats):
                blocks.append(InvertedResidual(channels, outputs, kernel, stride if number == 0 else 1, expansion))
                channels = outputs
        self.blocks = nn.ModuleList(blocks)
        self.head = Convolution(channels, NUM_FEATURES)
        self.classifier = nn.Linear(NUM_FEATURES, NUM_CLASSES)

    def forward(self, images_B3HW: Tensor, size: int | None = None) -> tuple[Tensor, Tensor]:
        """Return pooled features (B, 1280), all in [0, 6], and ImageNet class logits (B, 1000).

        images_B3HW: in [-1, 1]. size: side they are resized to, see `resize_for_lite0`.
        """
        x = self._stages(images_B3HW, size)[-1]
        features = self.head(x).mean(dim=(2, 3))
        return features, self.classifier(features)

    def stages(self, images_B3HW: Tensor, size: int | None = None) -> list[Tensor]:
        """Return five feature maps, fine to coarse, differentiable with respect to the images.

        They are (B, c, s, s) with the c of `STAGE_CHANNELS` and s = side / 2 ... side / 32, before any activation.
        Arguments as in `forward`.
        """
        return self._stages(images_B3HW, size)

    def _stages(self, images_B3HW: Tensor, size: int | None) -> list[Tensor]:
        x = resize_for_lite0(images_B3HW, size)
        # pixel values p in 0..255 enter as (p - 127) / 128; the mean / std of torchvision do not fit these weights
        x = self.stem(x * (127.5 / 128) + 0.5 / 128)
        maps = []
        for number, block in enumerate(self.blocks):
            x = block(x)
            if number in _STAGE_ENDS:
                maps.append(x)
        return maps


def default_side(height: int, width: int) -> int:
    """Return the side at which images of one size enter the network: 128 up to 128 px, 224 (its training side) above."""
    return 128 if max(height, width) <= 128 else 224


def resize_for_lite0(images_B3HW: Tensor, size: int | None = None) -> Tensor:
    """Resize images to `size` x `size` with antialiased bilinear interpolation, without going back to 8 bits.

    size: a multiple of 32; None takes `default_side`. Raises ShapeError for other shapes, ConfigError for other sizes.
    """
    check_shape("images", images_B3HW, ("B", 3, "H", "W"))
    height, width = images_B3HW.shape[2:]
    side = default_side(height, width) if size is None else size
    if side < _REDUCTION or side % _REDUCTION:
        raise ConfigError(f"lite0 reads sides that are multiples of {_REDUCTION}, but size is {side}")
    if (height, width) == (side, side):
        return images_B3HW
    # antialiasing does nothing on the way up, and its kernel is slow there
    shrinks = side < height or side < width
    return F.interpolate(images_B3HW, (side, side), mode="bilinear", align_corners=False, antialias=shrinks)


def load_lite0(device: torch.device | str = "cpu") -> Lite0:
    """Return the network with its ImageNet weights in float32, frozen, in eval mode.

    Raises IntegrityError if the weights of this install were changed.
    """
    with as_file(files("varcli") / "embedded" / "lite0") as folder:
        manifest = read_manifest(folder, KIND)
        state = read_checked_tensors(folder, WEIGHTS_NAME, manifest)
        network = Lite0()
        load_state(network, {name: tensor.float() for name, tensor in state.items()}, folder)
    return network.to(device).eval().requires_grad_(False)


def weights_sha256() -> str:
    """Return the SHA-256 of the weights file, as lower-case hex."""
    with as_file(files("varcli") / "embedded" / "lite0") as folder:
        return read_manifest(folder, KIND).files[WEIGHTS_NAME].sha256
