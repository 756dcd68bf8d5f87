"""The golden files of metrics: features and their scores, and the Inception network with weights from a formula.

The folder is tests/golden/eval, or the one that the environment variable VARCLI_GOLDEN_EVAL names; its README says how
they were made and how far a result may be off.
"""

from __future__ import annotations

import os
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

IS_FULL = "VARCLI_GOLDEN_EVAL" in os.environ
ROOT = Path(os.environ.get("VARCLI_GOLDEN_EVAL") or Path(__file__).parent / "golden" / "eval")

CASES = sorted(path.stem for path in ROOT.glob("*.npz") if path.stem.startswith(("feat_", "recipe_")))


@dataclass(frozen=True)
class FeatureCase:
    """Two sets of features and the scores they must get."""

    name: str
    reference: np.ndarray
    sample: np.ndarray
    scores: dict[str, float]


def load(name: str) -> dict[str, np.ndarray]:
    """The arrays of one file."""
    with np.load(ROOT / f"{name}.npz", allow_pickle=False) as stored:
        return {key: stored[key] for key in stored.files}


def feature_case(name: str) -> FeatureCase:
    """One `feat_*` or `recipe_*` file; the features of a recipe are made anew and checked."""
    arrays = load(name)
    scores = {key: float(value) for key, value in arrays.items() if value.shape == ()}
    if "seed" in arrays:
        reference, sample = _follow_recipe(int(arrays["seed"]), int(arrays["n_ref"]), int(arrays["n_sample"]))
        assert np.array_equal(reference[:2, :32], arrays["features_ref_first2x32"])
    else:
        scale = 16 if arrays["features_ref"].dtype == np.int8 else 1
        reference, sample = (arrays[key].astype(np.float32) / scale for key in ("features_ref", "features_sample"))
    return FeatureCase(name, reference, sample, scores)


def formula_weights(shapes: dict[str, Tensor], salt: int = 0) -> dict[str, Tensor]:
    """Weights of any network by the README's formula: splitmix64 of each value's number and its tensor's name."""
    return {name: _formula_tensor(name, tensor.shape, salt) for name, tensor in shapes.items()}


def formula_image(number: int, height: int, width: int, salt: int = 0) -> Tensor:
    """The `number`-th image of the README, uint8 (3, height, width)."""
    k = number + salt
    y, x, c = np.meshgrid(np.arange(height), np.arange(width), np.arange(3), indexing="ij")
    if number % 2 == 0:
        values = x * (3 + c) + y * (5 + 2 * c) + ((x * y) >> 3) + 37 * c + 11 * k
    else:
        waves = np.sin((x * (1 + c) + 7 * k) / 23) * np.cos((y * (2 + c) - 5 * k) / 31)
        values = 128 + np.floor(100 * waves).astype(np.int64) + ((x ^ y) & 15)
    return torch.from_numpy((values % 256).astype(np.uint8)).permute(2, 0, 1).contiguous()


def _follow_recipe(seed: int, num_ref: int, num_sample: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.RandomState(seed)
    basis = np.abs(random.randn(24, 2048)) * 0.08

    def draw(count: int, scale: float) -> np.ndarray:
        mixture = random.rand(count, 24) ** 3
        noise = random.randn(count, 2048)
        return np.maximum(scale * (mixture @ basis) + 0.22 * noise, 0).astype(np.float32)

    reference = draw(num_ref, 1.0)
    return reference, draw(num_sample, 1.06)


def _formula_tensor(name: str, shape: torch.Size, salt: int) -> Tensor:
    if name.endswith("num_batches_tracked"):
        return torch.zeros((), dtype=torch.int64)
    with np.errstate(over="ignore"):
        z = np.arange(1, shape.numel() + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z += np.uint64((zlib.crc32(name.encode()) << 32) | salt)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    u = (z >> np.uint64(40)).astype(np.float64) / 2**23 - 1
    if name.endswith("conv.weight"):
        u *= np.sqrt(6 / shape[1:].numel())
    elif name.endswith("bn.weight"):
        u = 1 + 0.25 * u
    elif name.endswith("running_var"):
        u = 1 + 0.5 * u
    else:
        u *= {"fc.weight": 0.12, "fc.bias": 0.5}.get(name, 0.1)
    return torch.from_numpy(u.astype(np.float32)).reshape(shape)
