"""A generation as one CUDA graph, from classes to pixels: the device never waits for Python to launch the next kernel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from varcli.sampling.noise import KeyedNoise, image_keys
from varcli.sampling.settings import SampleConfig

if TYPE_CHECKING:
    from varcli.sampling.generator import Generator

_WARM_UPS = 2  # runs before the capture: they compile, and make what libraries make at their first call

T = TypeVar("T")


def capture(run: Callable[[], T], device: torch.device) -> tuple[torch.cuda.CUDAGraph, T]:
    """Record what `run` does on a CUDA device; each replay of the graph writes the result that is returned here anew.

    run: must neither wait for the device nor depend on anything but tensors that stay where they are.
    """
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # other threads, which decode or save, may go on with what they do
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            result = run()
    return graph, result


class Engine:
    """Draws batches of one size with one set of settings but for the seed, on a CUDA GPU.

    Capturing takes about as long as drawing three batches, and keeps the memory of one.
    """

    def __init__(self, generator: Generator, config: SampleConfig, batch_size: int) -> None:
        self.generator, self.config = generator, config
        # keys and class numbers; keys first, as a kernel that reads them is compiled for how they lie in memory
        self.inputs_2B = torch.zeros(2, batch_size, dtype=torch.int64, device=generator.device)
        self.noise = KeyedNoise(0, [], [], generator.device)
        self.noise.keys_B = self.inputs_2B[0]
        self.graph, (self.images_B3HW, self.is_bad) = capture(self._run, generator.device)

    def start(self, seed: int, classes: Sequence[int], indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Begin to draw at most batch_size class numbers and indices, without waiting for the device.

        Returns the images, uint8 (n, 3, H, W) on the device, which the next call overwrites after all that was asked of the
        device before it, and what `Generator.require_finite` reads.
        """
        count, missing = len(classes), self.inputs_2B.shape[1] - len(classes)
        classes = [*classes, *[classes[-1]] * missing]  # a short batch draws its last image more than once
        indices = [*indices, *[indices[-1]] * missing]
        inputs_2B = torch.stack([image_keys(seed, classes, indices), torch.tensor(classes)])
        with torch.cuda.device(self.generator.device):
            self.inputs_2B.copy_(inputs_2B.pin_memory(), non_blocking=True)  # else the copy waits for the batch before
            self.graph.replay()
        return self.images_B3HW[:count], self.is_bad

    @torch.no_grad()
    def _run(self) -> tuple[Tensor, Tensor]:
        f_hat, is_bad = self.generator.generate_unchecked(self.inputs_2B[1], self.noise, self.config)
        return self.generator.decode(f_hat, self.config), is_bad
