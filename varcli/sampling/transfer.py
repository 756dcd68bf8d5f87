"""Images on their way from the device that drew them to the host, while the device goes on."""

from __future__ import annotations

import torch
from torch import Tensor


class Transfer:
    """A copy of tensors on the host, begun now and finished later.

    On CUDA it is asked for on the current stream, so that what is asked of the device afterwards, such as the next batch
    into the same buffers, comes after it; the host does not wait. Elsewhere it is made at once.
    """

    def __init__(self, *tensors: Tensor) -> None:
        self.is_done: torch.cuda.Event | None = None
        if not tensors[0].is_cuda:
            self.copies = tuple(tensor.detach().to("cpu", copy=True) for tensor in tensors)
            return
        # torch keeps pinned memory that was given back, so only the first few batches pay for it
        self.copies = tuple(torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True) for tensor in tensors)
        for copy, tensor in zip(self.copies, tensors, strict=True):
            copy.copy_(tensor, non_blocking=True)
        self.is_done = torch.cuda.Event()
        self.is_done.record(torch.cuda.current_stream(tensors[0].device))

    def wait(self) -> tuple[Tensor, ...]:
        """Return the copies, once they are there."""
        if self.is_done is not None:
            self.is_done.synchronize()
        return self.copies
