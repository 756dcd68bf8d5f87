"""Several processes on one job, as torchrun starts them: who this one is, numbers in common, and one voice for errors.

A process that torchrun did not start is alone: rank 0 of 1, without a process group, and everything here does nothing.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import numpy  # noqa: F401 - before torch, whose own import of it drops a Ctrl-C or SIGTERM
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from varcli.distributed.pulse import Pulse
from varcli.errors import ConfigError, LostProcessError, is_out_of_memory

_TIMEOUT_MINUTES = "120"  # one process may decode, hash or compute alone for long while the others wait
_EXCHANGE = re.compile(r"\b(gloo|nccl|connection (closed|reset)|timed out waiting)", re.IGNORECASE)
_LONGEST_PAUSE = 0.5  # seconds between a process's looks for the others: thousands may ask the one store
_LAST_WORDS = 1.0  # seconds that silent processes leave to the one that says what went wrong


@dataclass(frozen=True)
class World:
    """The processes of one job.

    The methods that exchange something must be called by every process alike, and raise LostProcessError if one is gone.
    Tensors are exchanged where they are, and no gradient passes through.
    """

    rank: int = 0  # of this process
    size: int = 1  # processes
    local_size: int = 1  # processes on this host

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes results and speaks."""
        return self.rank == 0

    def share(self, items: Sequence) -> Sequence:
        """Return this process's part of `items`: contiguous, all parts of nearly one length, together everything."""
        return items[len(items) * self.rank // self.size : len(items) * (self.rank + 1) // self.size]

    def wait(self) -> None:
        """Return when every process has come here."""
        self.largest(0)

    def largest(self, *values: int) -> list[int]:
        """Return the largest of all processes for each of `values`: how they agree on what to do next."""
        if self.size == 1:
            return list(values)
        agreed = torch.tensor(values, dtype=torch.int64)  # of the processor: nobody waits for a GPU's work
        with exchange():
            dist.all_reduce(agreed, dist.ReduceOp.MAX)
        return agreed.tolist()

    def say(self, text: str) -> str:
        """Return what the first process says; what the others say is not heard."""
        if self.size == 1:
            return text
        data = text.encode()
        (length,) = self.largest(len(data) if self.is_first else 0)
        heard = torch.frombuffer(bytearray(data.ljust(length, b" ")[:length]), dtype=torch.uint8)
        self.copy_first(heard)
        return bytes(heard.tolist()).decode()

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum of all processes' tensors of one shape; the same bits everywhere."""
        if self.size == 1:
            return tensor
        total = tensor.detach().clone(memory_format=torch.contiguous_format)
        with exchange():
            dist.all_reduce(total)
        return total

    def mean(self, tensor: Tensor) -> Tensor:
        """Return the mean of all processes' tensors of one shape; the same bits everywhere."""
        return self.sum(tensor) / self.size if self.size > 1 else tensor

    def gather(self, tensor: Tensor) -> Tensor:
        """Join all processes' tensors of one shape along the first dimension, in the order of ranks."""
        if self.size == 1:
            return tensor
        own = tensor.detach().contiguous()
        parts = [torch.empty_like(own) for _ in range(self.size)]
        with exchange():
            dist.all_gather(parts, own)
        return torch.cat(parts)

    @torch.no_grad()
    def copy_first(self, tensor: Tensor) -> None:
        """Overwrite a tensor with that of rank 0."""
        if self.size > 1:
            common = tensor.detach().clone(memory_format=torch.contiguous_format)
            with exchange():
                dist.broadcast(common, 0)
            tensor.copy_(common)


ALONE = World()
"""The world of a process that nobody else works with."""


@contextmanager
def join_world(device: str = "auto") -> Iterator[tuple[World, str]]:
    """Join the processes that torchrun started, and leave them at the end.

    device: as in `varcli.devices.resolve_device`. Yields the world and the device of this process: with several GPUs each
    takes the one of its local rank, or the only one it sees. Tensors on GPUs go through NCCL where each process has one of
    its own, all others through gloo, which every machine has. If the body raises, in however many processes, the error
    leaves this context in the first of them alone; the others end silently with status 1, so that one text tells what went
    wrong. A process that has ended is missed at once, one that answers no more after VARCLI_TIMEOUT minutes (120); the
    error names it.
    Raises ConfigError if torchrun's variables, or that one, make no sense.
    """
    timeout = _read_timeout()
    try:
        rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        world = World(rank, size, int(os.environ.get("LOCAL_WORLD_SIZE", str(size))))
    except ValueError as error:
        raise ConfigError(
            f"RANK, WORLD_SIZE and LOCAL_RANK must be whole numbers: {error}", "start with torchrun"
        ) from None
    if world.size == 1:
        yield world, device
        return
    gpu = None
    if device in ("auto", "cuda") and torch.cuda.is_available():
        device = f"cuda:{local_rank % torch.cuda.device_count()}"
        torch.cuda.set_device(device)  # NCCL and CUDA graphs look at the current one
        gpu = str(torch.cuda.get_device_properties(device).uuid)
    try:
        with exchange():
            store, rank, size = next(rendezvous("env://", timeout=timeout))
            pulse = Pulse(store, rank)
            backend = "cpu:gloo,cuda:nccl" if have_own_gpus(store, gpu, size, timeout) else "gloo"
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    except ValueError as error:  # of rendezvous, for a variable that is not set
        raise ConfigError(f"WORLD_SIZE is {world.size}, but {error}", "start with torchrun") from None
    try:
        world.wait()  # who fails before the others have joined, and leaves, would be missed by them: two texts in place of one
        yield world, device
    except BaseException as error:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's, for those that are left: last words come first
        if not _is_first_to_fail(store):
            _let_speak(store)
            if "nccl" in backend:
                os._exit(1)  # a kernel that waits for a process that is gone would keep the interpreter from ending
            raise SystemExit(1) from None
        if isinstance(error, LostProcessError):
            error = _name_lost(error, pulse, store, world)
        _finish_words(store)
        raise error from None
    pulse.stop()
    _leave(world, store)


def have_own_gpus(store: dist.Store, gpu: str | None, size: int, timeout: timedelta) -> bool:
    """Say whether every process computes on a GPU that no other one of the job uses; each must call it.

    gpu: what names this process's GPU in all the world, None without one. Schedulers may show each process one GPU alone,
    so that counting those it sees tells nothing.
    """
    if gpu is None or not dist.is_nccl_available() or store.add(f"varcli/gpu/{gpu}", 1) > 1:
        store.add("varcli/without", 1)
    if store.add("varcli/counted", 1) == size:
        store.set("varcli/complete", "")
    until, pause = time.monotonic() + timeout.total_seconds(), 0.02
    while not store.check(["varcli/complete"]):  # a wait in the store would hold up the signs of life
        if time.monotonic() > until:
            raise RuntimeError("timed out waiting for the other processes to start")
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE)
    return store.add("varcli/without", 0) == 0


def _read_timeout() -> timedelta:
    given = os.environ.get("VARCLI_TIMEOUT", _TIMEOUT_MINUTES)
    try:
        timeout = timedelta(minutes=float(given))
    except (ValueError, OverflowError):
        timeout = timedelta(0)
    if timeout <= timedelta(0):
        raise ConfigError(f"VARCLI_TIMEOUT must be minutes above 0, but is {given!r}")
    return timeout


def _leave(world: World, store: dist.Store) -> None:
    """End the exchange: the process that keeps the store last, since the others' threads fail when it goes before them."""
    dist.destroy_process_group()
    if not world.is_first:
        store.add("varcli/left", 1)
        return
    until = time.monotonic() + _LAST_WORDS
    while store.add("varcli/left", 0) < world.size - 1 and time.monotonic() < until:
        time.sleep(0.01)


@contextmanager
def exchange(and_more: bool = False) -> Iterator[None]:
    """Turn the error of an exchange with other processes into LostProcessError; running out of memory passes.

    and_more: the body does other things too, such as a backward pass that exchanges gradients; their errors pass.
    """
    try:
        yield
    except RuntimeError as error:  # gloo's are of no class of their own
        if is_out_of_memory(error):  # NCCL's buffers too
            raise
        if and_more and not isinstance(error, dist.DistError) and not _EXCHANGE.search(str(error)):
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise LostProcessError(
            f"another process of this job has ended or cannot be reached: {reason}",
            "torchrun's report may say why; run the same command again to go on from the last checkpoint",
        ) from None


def _name_lost(error: LostProcessError, pulse: Pulse, store: dist.Store, world: World) -> LostProcessError:
    """Say which processes are lost, where it can be told from those that have not noticed yet."""
    silent: list[int] = []
    with contextlib.suppress(RuntimeError):  # of a store that was lost too
        silent = pulse.find_silent(world.size)
    if not silent:
        return error
    shown = ", ".join(map(str, silent[:8])) + (", ..." if len(silent) > 8 else "")
    which = f"process {shown} has" if len(silent) == 1 else f"processes {shown} have"
    return LostProcessError(f"{which} ended or cannot be reached, of {world.size} counted from 0", error.hint)


def _finish_words(store: dist.Store) -> None:
    """Let the others go, who have waited for the one that speaks."""
    with contextlib.suppress(RuntimeError):
        store.set("varcli/spoken", "")


def _let_speak(store: dist.Store) -> None:
    """Wait, with signs of life, until the process that failed first knows what to say and has said it."""
    until = time.monotonic() + 10
    with contextlib.suppress(RuntimeError):  # the store ended with the process that kept it
        while not store.check(["varcli/spoken"]) and time.monotonic() < until:
            time.sleep(0.05)  # a wait in the store would hold up the signs of life
    time.sleep(_LAST_WORDS)


def _is_first_to_fail(store: dist.Store) -> bool:
    """Say whether no other process has failed before this one."""
    try:
        return store.add("varcli/failed", 1) == 1
    except RuntimeError:
        return False  # the store ended with the process that kept it, which has spoken
