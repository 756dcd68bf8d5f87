"""Which kernels are taken: torch where nothing is said, Triton where it is asked for and there."""

from __future__ import annotations

import pytest
import torch

from varcli.errors import ConfigError
from varcli.kernels import resolve_kernels


def test_auto_is_torch():
    for device in ("cpu", "cuda"):
        assert (
            resolve_kernels("auto", torch.device(device)) == resolve_kernels("torch", torch.device(device)) == "torch"
        )


def test_triton_needs_a_gpu():
    with pytest.raises(ConfigError, match="CUDA"):
        resolve_kernels("triton", torch.device("cpu"))


def test_unknown_kernels_are_refused():
    with pytest.raises(ConfigError, match="tritan"):
        resolve_kernels("tritan", torch.device("cuda"))
