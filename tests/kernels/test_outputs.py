"""What operators compute in, and the room they make for results."""

from __future__ import annotations

import pytest
import torch

from varcli.kernels.fp8 import round_rows
from varcli.kernels.outputs import dense_like, rows_like, wide_dtype


def test_operators_compute_in_float32_or_in_float64_where_that_comes_in():
    halves = (torch.float16, torch.bfloat16, torch.float32)
    assert {wide_dtype(torch.empty(1, dtype=dtype)) for dtype in halves} == {torch.float32}
    assert wide_dtype(torch.empty(1, dtype=torch.float64)) == torch.float64


@pytest.mark.parametrize("shape", [(3, 16), (2, 5, 16), (2, 1, 3, 16)])
def test_room_for_rows_is_as_their_rounding_gives_them(shape):
    x = torch.randn(shape).bfloat16()
    for room, made in zip(rows_like(x), round_rows(x.flatten(0, -2)), strict=True):
        assert (room.shape, room.dtype, room.stride()) == (made.shape, made.dtype, made.stride())


def test_room_is_contiguous_however_the_tensor_lies():
    x = torch.empty(2, 3, 4, dtype=torch.bfloat16).transpose(0, 2)
    room = dense_like(x)
    assert room.is_contiguous() and (room.shape, room.dtype) == (x.shape, x.dtype)
