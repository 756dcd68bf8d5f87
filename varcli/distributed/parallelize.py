"""One model in several processes, from outside: a copy in each, or a shard. The model itself is written for one device.

How a trainer uses it:

    parallel = parallelize(model, model.blocks, world, "fsdp", device, dtype)  # before optimizers look at the parameters
    for index, piece in enumerate(pieces):  # of this process's part of the batch
        with parallel.accumulating(is_last=index == len(pieces) - 1):
            parallel(measure, piece).backward()  # measure(model, piece)
    # every gradient is now the mean over all processes

Torch's DistributedDataParallel and FSDP2 do the work: while one layer's gradients travel, the next one's are computed.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from varcli.distributed.context import World, exchange
from varcli.errors import ConfigError, unknown_name

MODES = ("ddp", "fsdp", "hsdp")
"""What several processes may do: each has a copy; each has a shard; each host has a copy, in shards."""


class Parallel:
    """A model that one process trains alone; its children train it with the other processes.

    What is called through it is `function(model, ...)`, from forward pass to loss: all parameters are touched within.
    """

    is_sharded = False
    num_shards = 1  # processes that hold one copy together

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, function: Callable[..., Any], *inputs: Any) -> Any:
        """Return `function(model, *inputs)`; a backward pass from it averages gradients over the processes."""
        return function(self.model, *inputs)

    def accumulating(self, is_last: bool) -> AbstractContextManager:
        """Around forward and backward pass of each micro-batch of a step: only the last need exchange gradients."""
        return contextlib.nullcontext()

    def prepare_compiling(self) -> None:
        """Call before torch.compile meets the model or parts of it."""


class _Called(nn.Module):
    """A model as torch's wrappers want it: everything happens in its forward pass, and they see to what comes before."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[..., Any], *inputs: Any) -> Any:
        return function(self.model, *inputs)


class Replicated(Parallel):
    """A copy of the model in each process (DistributedDataParallel); gradients are averaged in buckets as they come."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # newer torch has another name for broadcast_buffers
            self._wrapped = nn.parallel.DistributedDataParallel(
                _Called(model), broadcast_buffers=False, gradient_as_bucket_view=True
            )

    def __call__(self, function: Callable[..., Any], *inputs: Any) -> Any:
        """See `Parallel`."""
        return self._wrapped(function, *inputs)

    def accumulating(self, is_last: bool) -> AbstractContextManager:
        """See `Parallel`."""
        return contextlib.nullcontext() if is_last else self._wrapped.no_sync()

    def prepare_compiling(self) -> None:
        """See `Parallel`."""
        # else each compiled block is cut at the bounds of the buckets, though its gradients come part by part as it is
        torch._dynamo.config.optimize_ddp = False


class Sharded(Parallel):
    """A shard of each parameter in each process of a group (FSDP2), gathered unit by unit when its turn comes.

    units: modules that are gathered one after another, such as blocks; what is outside of them stays together all the time.
    copies: 1, or how many groups have all shards each (HSDP). dtype: bfloat16 gathers the units in half the bytes, so that
    all their weights are rounded, not only those of matrix products; gradients are summed in float32 in any case. After
    each micro-batch the shards' gradients are summed, which keeps memory small; between copies only after the last.
    """

    is_sharded = True

    def __init__(
        self, model: nn.Module, units: Iterable[nn.Module], world: World, copies: int, device: torch.device, dtype: Any
    ) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        super().__init__(model)
        self._copies, self.num_shards = copies, world.size // copies
        for tensor in model.state_dict().values():  # one seed's weights may differ in the last bit between processors
            world.copy_first(tensor)
        shape, names = (
            ((copies, world.size // copies), ("copy", "shard")) if copies > 1 else ((world.size,), ("shard",))
        )
        mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
        # inputs are not rounded: what a model computes in float32 stays so
        exact = MixedPrecisionPolicy(cast_forward_inputs=False)
        half = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
        for unit in units:
            fully_shard(unit, mesh=mesh, mp_policy=half if dtype == torch.bfloat16 else exact)
        self._wrapped = fully_shard(_Called(model), mesh=mesh, mp_policy=exact)

    def __call__(self, function: Callable[..., Any], *inputs: Any) -> Any:
        """See `Parallel`."""
        return self._wrapped(function, *inputs)

    def accumulating(self, is_last: bool) -> AbstractContextManager:
        """See `Parallel`."""
        if self._copies > 1:
            self._wrapped.set_requires_all_reduce(is_last)
        return contextlib.nullcontext()


def parallelize(
    model: nn.Module,
    units: Iterable[nn.Module],
    world: World,
    mode: str,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> Parallel:
    """Spread a model, which is on `device`, over the processes of a world, and return how to call it.

    units: see `Sharded`. mode: one of MODES; a process alone needs none. dtype: precision of matrix products. With shards
    the model's parameters are DTensors from now on. Every process must call this alike.
    Raises ConfigError for an unknown mode, and for hsdp without several hosts of equally many processes.
    """
    require_mode(mode, world)
    if world.size == 1:
        return Parallel(model)
    if mode == "ddp":
        return Replicated(model)
    copies = world.size // world.local_size if mode == "hsdp" else 1
    return Sharded(model, units, world, copies, device, dtype)


def require_mode(mode: str, world: World) -> None:
    """Raise ConfigError for an unknown mode, and for hsdp where several processes are not several hosts of equally many."""
    if mode not in MODES:
        raise unknown_name("parallel mode", mode, MODES)
    copies, rest = divmod(world.size, world.local_size)
    if mode == "hsdp" and world.size > 1 and (copies < 2 or rest):
        raise ConfigError(
            f"hsdp keeps a copy a host, but {world.size} processes with {world.local_size} on this host are not several "
            "hosts of equally many",
            "use --parallel fsdp or ddp",
        )


def is_shard(tensor: Any) -> bool:
    """Say whether this process holds a part of a tensor only."""
    if not dist.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


@torch.no_grad()
def gather_whole(tensors: Mapping[str, Tensor], world: World) -> dict[str, Tensor] | None:
    """Put sharded tensors together, one after another: the first process gets them on the CPU, the others None.

    Every process must call it, with tensors of the same names in the same order.
    """
    found = {}
    for name, tensor in tensors.items():
        with exchange():
            whole = tensor.full_tensor() if is_shard(tensor) else tensor
        if world.is_first:
            found[name] = whole.detach().cpu()
    return found if world.is_first else None
