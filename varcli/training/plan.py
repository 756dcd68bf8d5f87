"""What a training run will take, worked out and partly tried before it starts."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from varcli.distributed import World
from varcli.errors import ConfigError
from varcli.transformer import TransformerConfig

# bytes that autograd keeps per token: of a block and channel beside the feed-forward layer's hidden ones, of a block and
# hidden channel, and of a channel outside the blocks. Counted (tests/training/test_plan.py), but for what torch compiles, where
# d16 at 256 px took 42 a block and channel on an H100; compiled by triton it took 36.7 there, where 37 are counted. Heads that
# the attention of varcli.kernels does not serve keep 2 more, which _USABLE has room for
_KEPT_BYTES = {
    ("torch", "half"): (47, 4, 11),
    ("torch", "compiled"): (28, 4, 11),
    ("torch", "fp32"): (61, 8, 13),
    ("triton", "half"): (21, 4, 5),
    ("triton", "compiled"): (21, 4, 5),
    ("triton", "fp32"): (45, 8, 9),
}
_LOGIT_BYTES = {"torch": 12, "triton": 0}  # per token and code: log-softmax, its gradient, and the logits'
_USABLE = 0.85  # of the free memory; the rest is fragmentation and workspaces
_TIGHT = 0.95  # of what this process may have, for a peak that was tried out and not estimated


@dataclass(frozen=True, kw_only=True)
class TrainPlan:
    """What a run is about to do, for people to look at before it starts."""

    recipe: str  # where open settings came from
    device: str  # where it runs
    precision: str  # of matrix products
    is_fp8: bool  # whether those of the blocks are in FP8
    is_compiled: bool  # whether torch.compile is used
    depth: int  # blocks of the transformer
    width: int  # its channels
    num_parameters: int  # its weights
    tokens_per_image: int  # L
    vocab_size: int  # codes to choose from
    num_images: int  # to train on
    num_views: int  # stored views of an image, at most
    num_validation: int  # rows to validate on; 0 is none
    num_classes: int  # without the row for no class
    start_step: int  # optimizer steps done by an earlier run
    steps: int  # optimizer steps of the whole run
    batch_size: int  # images a step
    micro_batch_size: int  # images at once, in each process
    processes: int  # that share a batch
    parallel: str  # how they do: ddp, fsdp or hsdp; of no meaning for one
    learning_rate: float  # peak
    memory_bytes: int  # estimate of the peak on the device
    # estimate for the steps that are left, from one timed micro-batch; validation, saving and what copies exchange come on top
    seconds: float
    notes: tuple[str, ...] = ()  # what a user should know

    @property
    def epochs(self) -> float:
        """Passes over the images."""
        return self.steps * self.batch_size / self.num_images


def activation_bytes(config: TransformerConfig, dtype: torch.dtype, is_compiled: bool, kernels: str = "torch") -> int:
    """Estimate of what one image needs between forward and backward. kernels: of `varcli.kernels.KERNELS`."""
    kind = "fp32" if dtype == torch.float32 else "compiled" if is_compiled else "half"
    beside, hidden, outside = _KEPT_BYTES[kernels, kind]
    per_block = beside + hidden * config.mlp_ratio + (hidden if config.dropout else 0)
    channels = config.width * (config.depth * per_block + outside)
    return round(config.seq_len * (channels + config.vocab_size * _LOGIT_BYTES[kernels]))


def coming_bytes(num_parameters: int, num_averages: int = 0) -> int:
    """What the state takes beside weights that are there: gradients, two moments, a half-precision copy while computing.

    num_averages: averages of weights that are not there yet.
    """
    return num_parameters * (4 + 8 + 2 + 4 * num_averages)


def update_bytes(num_parameters: int, num_averages: int) -> int:
    """What an update takes, when no activation is left: weights, gradients, two moments, averages, and one copy in passing."""
    return num_parameters * (4 + 4 + 8 + 4 * num_averages + 4)


def fit_micro_batch(batch_size: int, image_bytes: int, fixed_bytes: int, device: torch.device) -> int:
    """Return the largest equal share of a batch whose activations fit the device's memory, at least one image.

    image_bytes: of one image's activations. fixed_bytes: that will be taken from the memory that is free now beside them.
    """
    room = _USABLE * free_bytes(device) - fixed_bytes
    return share_evenly(batch_size, max(1, int(room / image_bytes)))


def share_evenly(batch_size: int, most: int) -> int:
    """Return the size of the largest equal pieces of a batch with at most `most` images each."""
    pieces = next((count for count in range(-(-batch_size // most), batch_size) if batch_size % count == 0), batch_size)
    even = batch_size // pieces
    # a batch with no fitting divisor, such as a prime, is cut unevenly instead of image by image
    return even if 2 * even >= min(most, batch_size) else min(most, batch_size)


def is_tight(memory_bytes: int, device: torch.device) -> bool:
    """Say whether a predicted peak leaves too little of a GPU: steps need some room that a first try does not show."""
    if device.type != "cuda":
        return False
    return memory_bytes > _TIGHT * (torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device))


def memory_hint(micro_batch_size: int, precision: str, can_shard: bool = False) -> str:
    """What to change when training runs out of memory, the least harmful first."""
    hints = []
    if micro_batch_size > 1:
        hints.append(f"--set micro_batch_size={micro_batch_size // 2} takes the same batch in smaller pieces")
    if precision == "fp32":
        hints.append("--precision bf16 halves what is kept")
    if can_shard:
        hints.append("--parallel fsdp spreads the state over the processes")
    return "; ".join(hints) or "one image at a time is too much already: use a smaller --depth, or a larger GPU"


def choose_mode(asked: str, optimizer: str, need_bytes: int, device: torch.device, world: World) -> str:
    """Return how several processes share a model: "ddp" if `need_bytes` more fit each one's device, else "fsdp", or as asked.

    Raises ConfigError for shards of matrices that an optimizer needs whole.
    """
    if asked == "auto":
        (is_tight,) = world.largest(need_bytes > _USABLE * free_bytes(device))
        asked = "fsdp" if is_tight and optimizer == "adamw" else "ddp"
    if asked != "ddp" and optimizer != "adamw" and world.size > 1:
        raise ConfigError(f"{optimizer} needs whole matrices, but {asked} cuts them up", "use ddp, or optimizer=adamw")
    return asked


def free_bytes(device: torch.device) -> int:
    """Memory that training may use: what is free on a GPU, a third of the machine's elsewhere."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 3
    except (AttributeError, ValueError, OSError):  # Windows
        return 4 * 2**30


def process_bytes() -> int:
    """Most memory this process has used so far; 0 where the system does not tell."""
    if sys.platform == "win32":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def time_once(work: Callable[[], object], device: torch.device) -> float:
    """Seconds that `work` takes, the device's own time included."""
    wait_for(device)
    start = time.monotonic()
    work()
    wait_for(device)
    return time.monotonic() - start


def wait_for(device: torch.device) -> None:
    """Wait until the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
