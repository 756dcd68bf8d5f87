"""LPIPS: the distance between images that was fitted to people's judgement (arXiv:1801.03924), version 0.1 on VGG16.

The weights are 528 MB and not part of varcli. Two published files make them up, and only these are read: VGG16 as
torchvision ships it, and the channel weights of LPIPS, which torch-fidelity and the authors' package have under two names.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varcli.artifacts.foreign import read_known_pickle
from varcli.artifacts.weights import load_state
from varcli.errors import ArtifactError, ShapeError
from varcli.shapes import check_shape

VGG_NAMES = ("vgg16-397923af.pth",)
VGG_SHA256 = "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0"
LPIPS_NAMES = ("weights-vgg16-lpips.pth", "vgg.pth")
LPIPS_SHA256 = "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868"

# channels of the convolutions of each stage, and their numbers in torchvision's list of layers; arXiv:1409.1556, column D
_STAGES = (((64, 64), (0, 2)), ((128, 128), (5, 7)), ((256,) * 3, (10, 12, 14)), ((512,) * 3, (17, 19, 21)))
_STAGES += (((512,) * 3, (24, 26, 28)),)
MIN_SIDE = 16  # pixels; VGG16 halves four times before its last stage
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # ImageNet's mean and deviation, for images in [-1, 1]


class Lpips(nn.Module):
    """LPIPS v0.1 with VGG16. Build it with `load_lpips`; a fresh one has random weights."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList()
        self.channel_weights = nn.ParameterList()
        inputs = 3
        for channels, _ in _STAGES:
            convs = nn.ModuleList()
            for outputs in channels:
                convs.append(nn.Conv2d(inputs, outputs, 3, padding=1))
                inputs = outputs
            self.stages.append(convs)
            self.channel_weights.append(nn.Parameter(torch.rand(1, inputs, 1, 1)))
        self.register_buffer("shift", torch.tensor(_SHIFT).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(_SCALE).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor, reconstructions: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1], at least 16 px; returns the mean distance, with gradients for the reconstructions.

        Raises ShapeError for other shapes.
        """
        check_shape("images", images, ("B", 3, "H", "W"))
        if min(images.shape[2:]) < MIN_SIDE:
            raise ShapeError(f"LPIPS reads images of {MIN_SIDE} px or more, but got {tuple(images.shape[2:])}")
        with torch.no_grad():
            wanted = self._maps(images)
        distance = reconstructions.new_zeros((), dtype=torch.float32)
        for want, have, weight in zip(wanted, self._maps(reconstructions), self.channel_weights, strict=True):
            # F.normalize, since the gradient of a plain square root is no number where all channels are 0
            difference = F.normalize(want.float(), dim=1, eps=1e-10) - F.normalize(have.float(), dim=1, eps=1e-10)
            distance = distance + (difference.square() * weight).sum(dim=1).mean()
        return distance

    def _maps(self, images: Tensor) -> list[Tensor]:
        x = (images - self.shift) / self.scale
        maps = []
        for number, convs in enumerate(self.stages):
            x = F.max_pool2d(x, 2) if number else x
            for conv in convs:
                x = F.relu(conv(x))
            maps.append(x)
        return maps


def load_lpips(folder: Path | None = None) -> Lpips:
    """Return the network with its published weights in float32, frozen, in eval mode.

    folder: holds both files; None takes torch's downloads, where torchvision and torch-fidelity leave them. Raises
    ArtifactError, saying which file is missing, UnsafeFileError for another file under such a name.
    """
    folder = Path(folder) if folder is not None else Path(torch.hub.get_dir()) / "checkpoints"
    vgg, lpips = _find(folder, VGG_NAMES), _find(folder, LPIPS_NAMES)
    layers, weights = read_known_pickle(vgg, VGG_SHA256), read_known_pickle(lpips, LPIPS_SHA256)
    network = Lpips()
    state = {}
    for stage, (_, numbers) in enumerate(_STAGES):
        for index, number in enumerate(numbers):
            for part in ("weight", "bias"):
                state[f"stages.{stage}.{index}.{part}"] = layers[f"features.{number}.{part}"]
        state[f"channel_weights.{stage}"] = weights[f"lin{stage}.model.1.weight"]
    load_state(network, {name: tensor.float() for name, tensor in state.items()}, folder)
    return network.eval().requires_grad_(False)


def _find(folder: Path, names: tuple[str, ...]) -> Path:
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise ArtifactError(
        f"LPIPS needs `{' or '.join(names)}` in `{folder}`, which is not there",
        f"put {VGG_NAMES[0]} (torchvision's) and {LPIPS_NAMES[0]} (torch-fidelity's) into one folder and name it with "
        "--lpips-weights, or --set lpips_weights=FOLDER in training, where perceptual=lite0 does without",
    )
