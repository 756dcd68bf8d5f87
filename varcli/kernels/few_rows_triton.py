"""A Triton kernel for products of few rows, whose time is that of reading their weights.

An early launch, CUDA's programmatic dependent launch, begins a kernel before the one it follows has ended. This kernel then
loads its weights, which no kernel writes, and waits with all else. It pays where the kernels around it are launched early, too:
those of `norm_triton` and `attention_step_triton` are if they are told. All of them wait before they read or write anything
else, so that each sees what every kernel before it has written.

Sizes: the fastest of twelve on an H100, with three stages (examples/benchmarks/sampling.md).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from varcli.kernels.gelu_triton import gelu

MOST_ROWS = 16
"""A tile of tensor cores: with 18 rows libraries are as fast."""

_COLUMNS = 16  # of a program
# parts of the inner dimension that are summed side by side, one a warp, and the length of each
_GROUPS, _PIECE = 4, 256
_NUM_STAGES = 2  # so that a program fits the shared memory of consumer GPUs


@triton.jit(do_not_specialize=["num_rows"])
def _varcli_few_rows_product(
    x_ptr, weight_ptr, bias_ptr, out_ptr, num_rows, width,
    ACTIVATES: tl.constexpr, IS_EARLY: tl.constexpr,
    DEPTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, GROUPS: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    if IS_EARLY:
        gdc_launch_dependents()
    rows, columns = tl.arange(0, ROWS), tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    is_row, is_column = rows < num_rows, columns < width
    inner = tl.arange(0, GROUPS)[:, None, None] * PIECE + tl.arange(0, PIECE)[None, None, :]
    weight_at = weight_ptr + columns[None, :, None] * DEPTH + inner
    x_at = x_ptr + rows[None, :, None] * DEPTH + inner
    weight = tl.load(weight_at, mask=is_column[None, :, None] & (inner < DEPTH), other=0)
    if IS_EARLY:
        gdc_wait()
    x = tl.load(x_at, mask=is_row[None, :, None] & (inner < DEPTH), other=0)
    sums = tl.dot(x, weight.permute(0, 2, 1), input_precision="ieee")
    for first in range(GROUPS * PIECE, DEPTH, GROUPS * PIECE):
        is_inner = first + inner < DEPTH
        weight = tl.load(weight_at + first, mask=is_column[None, :, None] & is_inner, other=0)
        x = tl.load(x_at + first, mask=is_row[None, :, None] & is_inner, other=0)
        sums = tl.dot(x, weight.permute(0, 2, 1), sums, input_precision="ieee")
    values = tl.sum(sums, axis=0)
    if ACTIVATES:
        values = gelu(values + tl.load(bias_ptr + columns, mask=is_column, other=0).to(tl.float32)[None, :])
    at = rows[:, None] * width + columns[None, :]
    tl.store(out_ptr + at, values.to(out_ptr.dtype.element_ty), mask=is_row[:, None] & is_column[None, :])


def launch_product(x_MK: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None, is_early: bool = False) -> Tensor:
    """Return x @ weight^T, or with a bias the GELU of its sum with that, for at most MOST_ROWS rows; float32 inside.

    weight_NK: contiguous; with `is_early` it is read before kernels that were launched shortly before have ended.
    """
    (num_rows, depth), width = x_MK.shape, len(weight_NK)
    assert num_rows <= MOST_ROWS and weight_NK.is_contiguous(), (num_rows, weight_NK.stride())
    out = x_MK.new_empty(num_rows, width)
    with torch.cuda.device_of(out):
        _varcli_few_rows_product[(triton.cdiv(width, _COLUMNS),)](
            x_MK.contiguous(),
            weight_NK,
            bias_N,
            out,
            num_rows,
            width,
            ACTIVATES=bias_N is not None,
            IS_EARLY=is_early,
            DEPTH=depth,
            ROWS=MOST_ROWS,
            COLUMNS=_COLUMNS,
            GROUPS=_GROUPS,
            PIECE=min(_PIECE, max(16, triton.next_power_of_2(triton.cdiv(depth, _GROUPS)))),
            num_stages=_NUM_STAGES,
            **early_launch(is_early),
        )
    return out


def early_launch(is_early: bool) -> dict[str, bool]:
    """What Triton is told for an early launch, or for none."""
    return {"launch_pdl": True} if is_early else {}
