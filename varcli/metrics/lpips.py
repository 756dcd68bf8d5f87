"""LPIPS: the learned perceptual distance of pairs of images, in the features of VGG16.

Source: Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", arXiv:1801.03924, Eq. 1,
version 0.1 with `net="vgg"`. The weights do not come with varcli. One file holds all of them: what
`torch.save(lpips.LPIPS(net="vgg").state_dict(), path)` of the lpips package writes, or the same of torch-fidelity's
`SampleSimilarityLPIPS`, whose names are equal; or a safetensors file with those names.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varcli.artifacts.foreign import read_foreign
from varcli.artifacts.manifest import hash_file
from varcli.artifacts.verify import require_finite
from varcli.artifacts.weights import load_state
from varcli.errors import ArtifactError
from varcli.shapes import check_shape

MIN_SIDE = 16  # pixels; VGG16 halves four times before its last stage

# stages of VGG16 (arXiv:1409.1556, configuration D): channels, and the places of the convolutions in torchvision's list
_STAGES = ((64, (0, 2)), (128, (5, 7)), (256, (10, 12, 14)), (512, (17, 19, 21)), (512, (24, 26, 28)))
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of pixels in [-1, 1]: ImageNet's mean and deviation
_EPSILON = 1e-10
_HINT = "save the whole of it: torch.save(lpips.LPIPS(net='vgg').state_dict(), 'lpips-vgg.pth')"


class Lpips(nn.Module):
    """LPIPS with VGG16. Build it with `load_lpips`; a fresh one has random weights."""

    def __init__(self) -> None:
        super().__init__()
        inputs = 3
        stages = []
        for channels, places in _STAGES:
            convolutions = []
            for _ in places:
                convolutions.append(nn.Conv2d(inputs, channels, 3, padding=1))
                inputs = channels
            stages.append(nn.ModuleList(convolutions))
        self.stages = nn.ModuleList(stages)
        self.channel_weights = nn.ParameterList(torch.rand(1, channels, 1, 1) for channels, _ in _STAGES)

    def forward(self, images_B3HW: Tensor, others_B3HW: Tensor) -> Tensor:
        """Return the distance of each pair of uint8 images, float32 (B,), 0 for equal ones.

        Raises ShapeError unless both are (B, 3, H, W).
        """
        distance = torch.zeros(len(images_B3HW), device=images_B3HW.device)
        pairs = zip(self._features(images_B3HW), self._features(others_B3HW), self.channel_weights, strict=True)
        for first, second, weights in pairs:
            difference = (_unit(first) - _unit(second)).square()
            distance = distance + (difference * weights).sum(dim=1).mean(dim=(1, 2))
        return distance

    def _features(self, images_B3HW: Tensor) -> list[Tensor]:
        check_shape("images", images_B3HW, ("B", 3, "H", "W"))
        shift, scale = (torch.tensor(values, device=images_B3HW.device).view(1, 3, 1, 1) for values in (_SHIFT, _SCALE))
        x = (images_B3HW.float() / 127.5 - 1 - shift) / scale
        maps: list[Tensor] = []
        for stage in self.stages:
            if maps:
                x = F.max_pool2d(x, 2)
            for convolution in stage:
                x = F.relu(convolution(x))
            maps.append(x)
        return maps


def load_lpips(path: Path, device: torch.device | str = "cpu") -> tuple[Lpips, str]:
    """Read a weights file, see above. Returns the network, frozen, and the file's SHA-256.

    Raises ArtifactError if the file does not hold all weights, UnsafeFileError if reading it could run code.
    """
    state = _own_names(read_foreign(path), path)
    network = Lpips()
    require_finite(state, f"`{path}`")
    load_state(network, {name: tensor.float() for name, tensor in state.items()}, path)
    return network.to(device).eval().requires_grad_(False), hash_file(path).sha256


def _own_names(state: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    """Pick the weights by the names that the lpips package gives them; what it saves twice is left out."""
    names = {}
    for number, (_, places) in enumerate(_STAGES):
        names[f"channel_weights.{number}"] = f"lin{number}.model.1.weight"
        for index, place in enumerate(places):
            for part in ("weight", "bias"):
                names[f"stages.{number}.{index}.{part}"] = f"net.slice{number + 1}.{place}.{part}"
    for name in names.values():
        if not isinstance(state.get(name), Tensor):
            raise ArtifactError(f"`{path}` does not hold LPIPS and its VGG16: the weight `{name}` is missing", _HINT)
    return {own: state[name] for own, name in names.items()}


def _unit(x_BCHW: Tensor) -> Tensor:
    """Scale the vector of channels at each place to length 1."""
    return x_BCHW / (x_BCHW.square().sum(dim=1, keepdim=True).sqrt() + _EPSILON)
