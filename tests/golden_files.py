"""The golden files: numbers of the public reference implementation, and how they are compared.

The folder is tests/golden, or the one that the environment variable VARCLI_GOLDEN names; see tests/golden/README.md.
"""

from __future__ import annotations

import functools
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

ROOT = Path(os.environ.get("VARCLI_GOLDEN") or Path(__file__).parent / "golden")

FEATURES = 1e-4  # of the largest value: encoder and decoder outputs, f_hat, logits
LONG_WAY = 5e-4  # of the largest value: pictures of every scale, pictures drawn with smooth codes
LOSS = 1e-5  # relative
GRADIENT_NORM = 1e-3  # relative, of each parameter
GRADIENT = 1e-3  # of the largest value
SAFE_MARGIN = 1e-4  # a code chosen by less than this may come out otherwise: that is rounding


@dataclass(frozen=True)
class Case:
    """One golden folder."""

    name: str

    @property
    def folder(self) -> Path:
        return ROOT / self.name

    @property
    def config(self) -> dict:
        return json.loads((self.folder / "config.json").read_text())

    @property
    def kind(self) -> str:
        return self.config["kind"]

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of `<name>.safetensors`, none if the file is not there."""
        path = self.folder / f"{name}.safetensors"
        return load_file(path) if path.exists() else {}

    def weights(self) -> dict[str, Tensor]:
        """The weights under the released code's names; those of `tok_full` are computed from a rule."""
        if self.config.get("weights") != "rule":
            return self.tensors("weights")
        weights = self.tensors("base")
        base = weights.pop("base")
        for name, rule in json.loads((self.folder / "rule.json").read_text()).items():
            count = torch.Size(rule["shape"]).numel()
            picked = base[(rule["offset"] + torch.arange(count)) % len(base)]
            weights[name] = (picked * rule["mul"] + rule["add"]).reshape(rule["shape"])
        return weights

    def tokenizer_case(self) -> Case:
        """The tokenizer whose codes this transformer predicts."""
        return Case(self.config["tokenizer"])


def cases(*kinds: str, having: str = "config.json") -> list[Case]:
    """The golden folders of these kinds ("quantizer", "vqvae", "var") that hold a file."""
    found = [Case(path.parent.name) for path in sorted(ROOT.glob(f"*/{having}"))]
    return [case for case in found if case.kind in kinds]


def whole_tokenizers() -> list[Case]:
    """The tokenizer folders that hold encoder and decoder too: tests/golden keeps only the quantizer of some."""
    return [case for case in cases("vqvae") if case.config.get("weights") == "rule" or "encoder" in _names(case)]


def parametrize(found: list[Case]) -> dict:
    """Arguments of pytest.mark.parametrize for cases, named by their folders."""
    return {"argnames": "case", "argvalues": found, "ids": [case.name for case in found]}


def thinned(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """All forms in which a tensor is stored: whole, every Nth in the last two dimensions, first sample, a crop."""
    pattern = re.compile(re.escape(name) + r"(_stride\d+|_b0|_crop64)?")
    return {key: tensor for key, tensor in tensors.items() if pattern.fullmatch(key)}


def thin_like(key: str, tensor: Tensor) -> Tensor:
    """Take of a whole tensor what a stored one's name says."""
    if match := re.search(r"_stride(\d+)$", key):
        return tensor[..., :: int(match[1]), :: int(match[1])]
    if key.endswith("_crop64"):
        return tensor[..., 200:264, 200:264]
    return tensor[:1] if key.endswith("_b0") else tensor


def assert_stored(tensors: dict[str, Tensor], name: str, actual: Tensor, tolerance: float) -> None:
    """Compare a tensor with every form of it that is stored; at least one must be."""
    stored = thinned(tensors, name)
    assert stored, f"no golden `{name}`"
    for key, expected in stored.items():
        assert_near(thin_like(key, actual), expected, tolerance, key)


def assert_near(actual: Tensor, expected: Tensor, tolerance: float, name: str = "") -> None:
    """The largest difference is within `tolerance` of the largest expected value."""
    assert actual.shape == expected.shape, f"{name}: {tuple(actual.shape)}, golden {tuple(expected.shape)}"
    difference = (actual.double() - expected.double()).abs().max().item()
    limit = tolerance * expected.abs().max().item()
    assert difference <= limit, f"{name}: differs by {difference:.3g}, allowed {limit:.3g}"


def assert_codes(codes: Tensor, expected: Tensor, margin: Tensor) -> None:
    """Codes are equal wherever the reference's choice was not decided by rounding."""
    wrong = (codes != expected) & (margin >= SAFE_MARGIN)
    assert not wrong.any(), f"{int(wrong.sum())} of {wrong.numel()} codes differ"


@functools.cache
def _names(case: Case) -> str:
    return " ".join(case.tensors("weights"))
