"""What Triton kernels of this room share that also round their rows to FP8, as `varcli.kernels.fp8.round_rows` does."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def row_scale(largest):
    """Return the scale of a row whose largest entry is this."""
    return tl.maximum(largest, 1e-30) / 448.0
