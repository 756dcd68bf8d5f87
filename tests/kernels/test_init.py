"""Which kernels are taken: Triton on a GPU where it is there, else torch."""

from __future__ import annotations

import pytest
import torch

import varcli.kernels as kernels_room
from varcli.errors import ConfigError
from varcli.kernels import resolve_kernels
from varcli.kernels.wake import wake


def test_auto_is_triton_on_a_gpu_that_has_it_and_torch_elsewhere(monkeypatch):
    assert resolve_kernels("auto", torch.device("cpu")) == "torch"
    for is_there, capability, kernels in ((True, (9, 0), "triton"), (False, (9, 0), "torch"), (True, (7, 5), "torch")):
        monkeypatch.setattr(kernels_room, "HAS_TRITON", is_there)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert resolve_kernels("auto", torch.device("cuda")) == kernels
    assert resolve_kernels("torch", torch.device("cuda")) == "torch"


def test_triton_needs_a_compiler_and_headers_for_what_it_builds(monkeypatch, tmp_path):
    for name in ("gcc", "Python.h"):
        (tmp_path / name).touch(mode=0o755)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(kernels_room.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(kernels_room.sysconfig, "get_path", lambda name, scheme: str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert kernels_room.is_triton_there()
    (tmp_path / "gcc").unlink()
    assert not kernels_room.is_triton_there()
    monkeypatch.setenv("CC", "/opt/cc")
    assert kernels_room.is_triton_there()
    (tmp_path / "Python.h").unlink()
    assert not kernels_room.is_triton_there()
    monkeypatch.setattr(kernels_room, "HAS_TRITON", False)
    with pytest.raises(ConfigError, match="C compiler"):
        resolve_kernels("triton", torch.device("cuda"))


def test_triton_needs_a_gpu():
    with pytest.raises(ConfigError, match="CUDA"):
        resolve_kernels("triton", torch.device("cpu"))


def test_amds_gpus_take_torch(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert resolve_kernels("auto", torch.device("cuda")) == "torch"
    with pytest.raises(ConfigError, match="an AMD GPU"):
        resolve_kernels("triton", torch.device("cuda"))


def test_unknown_kernels_are_refused():
    with pytest.raises(ConfigError, match="tritan"):
        resolve_kernels("tritan", torch.device("cuda"))


@pytest.mark.gpu
def test_all_that_is_awakened_is_there():
    wake(torch.device("cuda", 0))


def test_without_a_gpu_there_is_nothing_to_wake():
    wake(torch.device("cpu"))
