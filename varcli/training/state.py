"""All of a trainer that changes while it trains, as flat named tensors and JSON; and the random numbers' state.

Optimizer moments go by the names of their parameters, so that a checkpoint says what it holds and survives another
order of parameters.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from varcli.artifacts.weights import load_state
from varcli.distributed import World
from varcli.distributed.parallelize import is_shard
from varcli.errors import ArtifactError
from varcli.training.ema import Ema
from varcli.training.optim import LossScale


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What a checkpoint holds, each by a name of the trainer's choosing (plain file names)."""

    modules: Mapping[str, nn.Module]  # weights and buffers; one safetensors file each
    optimizers: Mapping[str, Optimizer] = field(default_factory=dict)  # over parameters of these modules
    averages: Mapping[str, Ema] = field(default_factory=dict)
    generators: Mapping[str, torch.Generator] = field(default_factory=dict)
    loss_scales: Mapping[str, LossScale] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """Where the modules are."""
        return next(parameter.device for module in self.modules.values() for parameter in module.parameters())

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Everything as tensors, by file: one a module, then optimizer, ema and random state."""
        files = {name: dict(module.state_dict()) for name, module in self.modules.items()}
        files["optimizer"] = {
            f"{name}/{key}": tensor
            for name, optimizer in self.optimizers.items()
            for key, tensor in optimizer_tensors(optimizer, self._parameter_names()).items()
        }
        files["optimizer"] |= {f"{name}/loss_scale": scale.state for name, scale in self.loss_scales.items()}
        files["ema"] = {
            f"{name}/{key}": tensor
            for name, average in self.averages.items()
            for key, tensor in average.tensors().items()
        }
        files["random"] = capture_random(self.device)
        files["random"] |= {
            f"generator/{name}/{source.device.type}": source.get_state() for name, source in self.generators.items()
        }
        return {name: tensors for name, tensors in files.items() if tensors}

    def layout(self, file: str, key: str) -> Tensor | None:
        """Return the parameter or average here that a stored tensor is laid out like, None if it is like neither."""
        if file == "ema":
            name, _, key = key.partition("/")
            return self.averages[name].tensors().get(key) if name in self.averages else None
        if file == "optimizer":  # <optimizer>/<module>.<parameter>/<entry>
            file, _, key = key.partition("/")[2].rpartition("/")[0].partition(".")
        try:
            return self.modules[file].get_parameter(key)
        except (KeyError, AttributeError):
            return None

    def load(self, files: Mapping[str, Mapping[str, Tensor]], where: Path) -> None:
        """Take over what `tensors` returned earlier. `where` is for messages.

        Raises ArtifactError naming the first tensor that is missing, left over or of another shape.
        """
        for name, module in self.modules.items():
            load_state(module, files.get(name, {}), where / f"{name}.safetensors")
        stored = files.get("optimizer", {})
        for name, optimizer in self.optimizers.items():
            load_optimizer(optimizer, self._parameter_names(), _below(stored, name), where)
        for name, scale in self.loss_scales.items():
            if f"{name}/loss_scale" in stored:
                scale.state.copy_(stored[f"{name}/loss_scale"])
        for name, average in self.averages.items():
            average.load(_below(files.get("ema", {}), name))
        states = files.get("random", {})
        for name, source in self.generators.items():
            _restore_generator(source, _below(states, f"generator/{name}"), f"`{where}` holds no state of `{name}`")
        restore_random(states, self.device)

    def start_alike(self, world: World) -> None:
        """Give all processes rank 0's weights and averages: one seed's may differ in the last bit between processors.

        Shards are left alone: they were cut from the same weights.
        """
        if world.size > 1:
            everything = [module.state_dict() for module in self.modules.values()]
            everything += [average.tensors() for average in self.averages.values()]
            for tensor in (tensor for tensors in everything for tensor in tensors.values() if not is_shard(tensor)):
                world.copy_first(tensor)

    def _parameter_names(self) -> dict[int, str]:
        return {
            id(parameter): f"{name}.{key}"
            for name, module in self.modules.items()
            for key, parameter in module.named_parameters()
        }


def optimizer_tensors(optimizer: Optimizer, names: Mapping[int, str]) -> dict[str, Tensor]:
    """Return an optimizer's state as `<parameter name>/<entry>`; `names` maps the id of a parameter to its name."""
    return {
        f"{names[id(parameter)]}/{entry}": value if isinstance(value, Tensor) else torch.as_tensor(value)
        for parameter, state in optimizer.state.items()
        for entry, value in state.items()
    }


def load_optimizer(optimizer: Optimizer, names: Mapping[int, str], tensors: Mapping[str, Tensor], where: Path) -> None:
    """Put back what `optimizer_tensors` returned; a parameter that never had a gradient has no state.

    Raises ArtifactError if state is of another shape than its parameter, or belongs to none.
    """
    by_parameter: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        parameter, _, entry = key.rpartition("/")
        by_parameter.setdefault(parameter, {})[entry] = tensor
    state = optimizer.state_dict()
    order = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if by_parameter:  # empty before the first step
        for parameter in order:
            moments = by_parameter.get(names[id(parameter)], {})
            if any(tensor.ndim and tensor.shape != parameter.shape for tensor in moments.values()):
                raise ArtifactError(f"`{where}` holds no fitting optimizer state of `{names[id(parameter)]}`")
        unknown = sorted(set(by_parameter) - {names[id(parameter)] for parameter in order})
        if unknown:
            raise ArtifactError(f"`{where}` holds optimizer state of an unknown parameter `{unknown[0]}`")
        found = [by_parameter.get(names[id(parameter)]) for parameter in order]
        state["state"] = {index: moments for index, moments in enumerate(found) if moments is not None}
    optimizer.load_state_dict(state)


def capture_random(device: torch.device) -> dict[str, Tensor]:
    """Return the state of every random source of the process, and of the device's, as uint8 tensors."""
    version, words, gauss = random.getstate()
    numpy_state = np.random.get_state(legacy=False)
    numpy_state["state"]["key"] = [int(word) for word in numpy_state["state"]["key"]]
    states = {
        "python": _to_bytes([version, list(words), gauss]),
        "numpy": _to_bytes(numpy_state),
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    elif device.type == "mps":
        states["mps"] = torch.mps.get_rng_state()
    return states


def restore_random(states: Mapping[str, Tensor], device: torch.device) -> None:
    """Put back what `capture_random` returned; sources that it does not name stay as they are."""
    if "python" in states:
        version, words, gauss = _from_bytes(states["python"])
        random.setstate((version, tuple(words), gauss))
    if "numpy" in states:
        numpy_state = _from_bytes(states["numpy"])
        numpy_state["state"]["key"] = np.array(numpy_state["state"]["key"], dtype=np.uint32)
        np.random.set_state(numpy_state)
    if "torch" in states:
        torch.set_rng_state(states["torch"].cpu())
    if "cuda" in states and device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"].cpu(), device)
    if "mps" in states and device.type == "mps":
        torch.mps.set_rng_state(states["mps"].cpu())


@contextmanager
def undisturbed(device: torch.device) -> Iterator[None]:
    """Run the body without moving any random source: for sampling or measuring in the middle of a training run."""
    states = capture_random(device)
    try:
        yield
    finally:
        restore_random(states, device)


def _restore_generator(source: torch.Generator, states: Mapping[str, Tensor], problem: str) -> None:
    """Put a generator's state back. One of another kind of device cannot be: its hash seeds a new sequence then."""
    if not states:
        raise ArtifactError(problem, "the checkpoint was made by other settings")
    if source.device.type in states:
        source.set_state(states[source.device.type].cpu())
        return
    state = next(iter(states.values()))
    source.manual_seed(int.from_bytes(hashlib.sha256(bytes(state.tolist())).digest()[:7]))


def _below(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    start = f"{name}/"
    return {
        key.removeprefix(start): tensor
        for key, tensor in tensors.items()
        if key.startswith(start) and key != f"{name}/loss_scale"
    }


def _to_bytes(value: Any) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def _from_bytes(tensor: Tensor) -> Any:
    return json.loads(bytes(tensor.tolist()))
