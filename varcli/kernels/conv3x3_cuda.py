"""Launches the CUDA kernel of `varcli.kernels.conv3x3`, which is in conv3x3.cu."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from varcli.kernels.conv3x3 import COLUMNS, DEPTH, TILE_WIDTH, num_sums, tile_rows
from varcli.kernels.nvrtc import CudaKernel

_THREADS = 384  # a warpgroup that fetches and two that multiply
_SLABS, _WEIGHTS = 6, 6  # places of their rings


@functools.cache
def kernel_for(is_fp16: bool, rows: int, outputs: int) -> CudaKernel:
    """The kernel whose blocks compute tiles of so many rows, for maps of so many channels."""
    pixels = (rows + 2) * (TILE_WIDTH + 2)
    plane = -(-pixels * 16 // 128) * 128 + 32  # 8 channels of a slab, so that four lie in other banks
    slabs, weights = _SLABS * DEPTH // 8 * plane, _WEIGHTS * 2 * DEPTH * COLUMNS
    sums, barriers, bias = 4 * 8 * 2 * COLUMNS, 8 * 2 * (_SLABS + _WEIGHTS), 4 * outputs
    macros = {"HALF": int(is_fp16), "TILE_ROWS": rows, "TILE_WIDTH": TILE_WIDTH, "COLUMNS": COLUMNS, "DEPTH": DEPTH}
    macros |= {"NUM_SLABS": _SLABS, "NUM_WEIGHTS": _WEIGHTS, "PLANE": plane}
    shared_bytes = slabs + weights + sums + barriers + bias
    return CudaKernel("conv3x3.cu", "varcli_conv3x3", tuple(macros.items()), _THREADS, shared_bytes)


def launch_conv3x3(
    tokens_BNC: Tensor,
    weight: Tensor,
    bias_O: Tensor | None,
    skip_BNO: Tensor | None,
    scale_BC: Tensor | None,
    shift_BC: Tensor | None,
    height: int,
    width: int,
) -> tuple[Tensor, Tensor]:
    """Return the tokens (B, N, O) of the map convolved by a packed weight, and partial sums (B, parts, 2, O), float32."""
    batch, length, channels = tokens_BNC.shape
    outputs = len(weight) * COLUMNS
    rows = tile_rows(batch, height, width, outputs)
    num_tiles = batch * (length // (rows * TILE_WIDTH)) * (outputs // COLUMNS)
    out = torch.empty(batch, length, outputs, dtype=tokens_BNC.dtype, device=tokens_BNC.device)
    parts = num_sums(batch, height, width, outputs)
    sums = torch.empty(batch, parts, 2, outputs, dtype=torch.float32, device=tokens_BNC.device)
    if num_tiles == 0:
        return out, sums
    with torch.cuda.device_of(out):
        kernel_for(tokens_BNC.dtype == torch.float16, rows, outputs).launch(
            min(num_tiles, torch.cuda.get_device_properties(out.device).multi_processor_count),
            tokens_BNC.contiguous(),
            weight.contiguous(),
            *(None if part is None else part.float().contiguous() for part in (scale_BC, shift_BC, bias_O)),
            None if skip_BNO is None else skip_BNO.contiguous(),
            out,
            sums,
            *(height, width, channels, outputs, num_tiles),
        )
    return out, sums
