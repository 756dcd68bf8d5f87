"""Features of the Inception network, with the weights that papers use: where these are found and how they are read."""

from __future__ import annotations

import os
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from varcli.artifacts.foreign import read_foreign, read_known_pickle
from varcli.artifacts.manifest import hash_file
from varcli.artifacts.verify import require_finite
from varcli.artifacts.weights import load_state
from varcli.errors import ArtifactError

WEIGHTS_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
WEIGHTS_NAMES = ("weights-inception-2015-12-05-6726825d.pth", "pt_inception-2015-12-05-6726825d.pth")
WEIGHTS_VARIABLE = "VARCLI_INCEPTION_WEIGHTS"
_NUM_LOGITS = 1008
_SPATIAL_CHANNELS = 7  # the first of mixed_6/conv; 17 * 17 * 7 = 2023 values


class InceptionExtractor:
    """Pooled features (B, 2048), spatial features (B, 2023) and logits without bias (B, 1008)."""

    name = "inception"
    num_features = 2048
    batch_size = 32

    def __init__(self, weights: Path, device: torch.device, allow_unknown: bool = False) -> None:
        """Read the weights file.

        allow_unknown: also take another file than the published one. Raises ArtifactError for another file, or one that
        does not fit; UnsafeFileError for one that could run code.
        """
        self.device = device
        self.weights_sha256 = _hash(weights)
        if self.weights_sha256 == WEIGHTS_SHA256:
            self._state = read_known_pickle(weights, WEIGHTS_SHA256)
        elif allow_unknown:
            self._state = read_foreign(weights)
        else:
            raise ArtifactError(
                f"`{weights}` is not the Inception file of published FIDs: its SHA-256 is {self.weights_sha256[:16]}..., "
                f"that of the file is {WEIGHTS_SHA256[:16]}...",
                f"pass {WEIGHTS_NAMES[0]} (95.6 MB), as released by torch-fidelity",
            )
        self._weights = weights
        self._spatial: Tensor | None = None
        if getattr(self._state.get("fc.weight"), "shape", None) != (_NUM_LOGITS, self.num_features):
            _ = self.network  # which raises, naming what does not fit

    @cached_property
    def network(self) -> nn.Module:
        """The network, built when images come: kept features need none, and what it imports takes seconds."""
        from varcli.metrics.inception_network import InceptionNetwork

        network = InceptionNetwork()
        counters = {name: value for name, value in network.state_dict().items() if name.endswith("num_batches_tracked")}
        require_finite(self._state, f"`{self._weights}`")
        load_state(network, {**counters, **self._state}, self._weights)
        # the output after batch norm and ReLU, as the graph's tensor `mixed_6/conv`
        network.Mixed_6d.branch1x1.register_forward_hook(self._keep_spatial)
        # an H100 reads 2,131 images a second in float32 this way, 1,742 with channels last, which CPUs prefer
        layout = torch.contiguous_format if self.device.type == "cuda" else torch.channels_last
        return network.to(self.device, memory_format=layout).eval().requires_grad_(False)

    def preprocessing(self, height: int, width: int) -> str:
        """Say how images enter the network."""
        return "bilinear to 299 px as in TensorFlow 1 (no antialiasing, no half-pixel centres), (p - 128) / 128"

    def extract(self, images_B3HW: Tensor, spatial: bool = False) -> tuple[Tensor, Tensor | None]:
        """Return pooled and, if asked for, spatial features of uint8 images."""
        (features,) = self.network(images_B3HW.to(self.device, non_blocking=True))
        kept, self._spatial = self._spatial, None
        return features, kept if spatial else None

    def logits(self, features: Tensor) -> Tensor:
        """Return the logits of the Inception Score, which leave out the bias."""
        return features @ self._classes.T

    @cached_property
    def _classes(self) -> Tensor:
        return self._state["fc.weight"].to(self.device)

    def _keep_spatial(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        # flattened with channels last, as in TensorFlow; another order does not match stored statistics
        self._spatial = output[:, :_SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)


def find_inception_weights(path: Path | None = None) -> Path | None:
    """Return where the weights are: `path`, else $VARCLI_INCEPTION_WEIGHTS, else torch's download folder, else None.

    Raises ArtifactError if one of the first two is given and is not a file.
    """
    for given, source in ((path, "--inception-weights"), (os.environ.get(WEIGHTS_VARIABLE), WEIGHTS_VARIABLE)):
        if given:
            if not Path(given).is_file():
                raise ArtifactError(f"{source} names `{given}`, which is not a file")
            return Path(given)
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    return next((folder / name for name in WEIGHTS_NAMES if (folder / name).is_file()), None)


def _hash(path: Path) -> str:
    try:
        return hash_file(path).sha256
    except OSError as error:
        raise ArtifactError(f"cannot read the Inception weights `{path}`: {error.strerror}") from None
