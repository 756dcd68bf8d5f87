"""What a GPU's libraries make at their first call, made while something else is waited for."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from varcli.kernels import resolve_kernels
from varcli.kernels.norm import norm


def wake(device: torch.device) -> None:
    """Call each library that a transformer and a decoder are computed by once, so that the first picture does not wait.

    Meant for a thread of its own, while files are read: CUDA, cuBLAS, cuDNN and Triton together take a second at their first
    call on an H100. Does nothing elsewhere. device: with the number of its GPU, since each thread has a current one.
    """
    if device.type != "cuda":
        return
    with torch.no_grad(), torch.cuda.device(device):
        for dtype in (torch.bfloat16, torch.float64):
            square = torch.zeros(64, 64, dtype=dtype, device=device)
            F.linear(square, square, square[0])
            square @ square
        F.conv2d(torch.zeros(1, 32, 8, 8, device=device), torch.zeros(32, 32, 3, 3, device=device), padding=1)
        if resolve_kernels("auto", device) == "triton":
            row = torch.zeros(1, 1, 64, dtype=torch.bfloat16, device=device)
            norm(row, row, row, 1e-6)
