"""Features of the network that comes with varcli. What is computed from them is never called FID."""

from __future__ import annotations

import torch
from torch import Tensor

from varcli.pretrained.lite0 import NUM_FEATURES, default_side, load_lite0, weights_sha256


class Lite0Extractor:
    """Pooled features of EfficientNet-lite0, (B, 1280), and its class logits."""

    name = "lite0"
    num_features = NUM_FEATURES
    batch_size = 16  # on a CPU of 2 cores 212 images/s; 150 with 64, which leave the cache

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.network = load_lite0(device).to(memory_format=torch.channels_last)
        self.weights_sha256 = weights_sha256()

    def preprocessing(self, height: int, width: int) -> str:
        """Say how images of this size enter the network."""
        return f"antialiased bilinear to {default_side(height, width)} px, (p - 127) / 128"

    def extract(self, images_B3HW: Tensor, spatial: bool = False) -> tuple[Tensor, None]:
        """Return features of uint8 images; this network has no spatial features."""
        images = images_B3HW.to(self.device, torch.float32) / 127.5 - 1
        return self.network(images.contiguous(memory_format=torch.channels_last))[0], None

    def logits(self, features: Tensor) -> Tensor:
        """Return the class logits (B, 1000) that belong to features."""
        return self.network.classifier(features)
