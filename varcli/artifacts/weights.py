"""Weights into modules: every name and shape accounted for, or one error that names the first mismatch."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from varcli.errors import ArtifactError

if TYPE_CHECKING:
    import torch

# functions of torch.nn.init and tensors that return what they change: on the meta device some import sympy or the compiler
_LEFT_OUT = ("normal_", "uniform_", "div_", "erfinv_", "clamp_")
_ON_META = threading.Lock()  # threads here take turns: torch keeps one device to return to for all
_HINT = "its config and its weights do not belong together"


@contextmanager
def without_weights() -> Iterator[None]:
    """Build modules on torch's meta device, for `load_state(..., assign=True)`: nothing is drawn, no memory is taken.

    Drawing there is not only work for nothing: torch then imports its compiler, which takes seconds.
    """
    import torch
    from torch.overrides import TorchFunctionMode

    class NoDraws(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func.__name__ in _LEFT_OUT:
                return args[0] if args else kwargs["tensor"]
            return func(*args, **(kwargs or {}))

    with _ON_META, torch.device("meta"), NoDraws():
        yield


def load_state(module: torch.nn.Module, state: Mapping[str, torch.Tensor], where: Path, assign: bool = False) -> None:
    """Load weights strictly; `where` is for messages.

    assign: let the module hold these tensors instead of copying them, as a module on the meta device needs.
    Raises ArtifactError if a weight is missing, has another shape or kind of numbers, or has no place.
    """
    expected = module.state_dict()
    for name, tensor in expected.items():
        if name not in state:
            raise ArtifactError(f"`{where}` lacks the weight `{name}`", _HINT)
        if state[name].shape != tensor.shape:
            have, want = tuple(state[name].shape), tuple(tensor.shape)
            raise ArtifactError(f"`{where}`: weight `{name}` has shape {have}, its config needs {want}", _HINT)
        if state[name].is_floating_point() != tensor.is_floating_point():
            have, want = (str(one.dtype).removeprefix("torch.") for one in (state[name], tensor))
            raise ArtifactError(f"`{where}`: weight `{name}` holds {have}, its config needs {want}", _HINT)
    unexpected = sorted(set(state) - set(expected))
    if unexpected:
        raise ArtifactError(f"`{where}` holds a weight that its config has no place for: `{unexpected[0]}`")
    module.load_state_dict(dict(state), assign=assign)
