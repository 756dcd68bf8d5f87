"""What every metric takes: rows of numbers, checked once, as float64 tensors in pieces that fit into memory."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from varcli.errors import ShapeError

Rows = np.ndarray | Tensor
"""A float array of shape (N, D): one row an image."""

_NEAR_BYTES = 2**30  # 50,000 rows of Inception's features take 0.4 GB


def check_rows(name: str, rows: Rows, min_rows: int = 1) -> Rows:
    """Return `rows` if it is a finite float array (N, D) with at least `min_rows` rows, else raise ShapeError.

    name: for messages, e.g. "features_ref".
    """
    if not isinstance(rows, (np.ndarray, Tensor)):
        raise ShapeError(f"{name} must be an array or tensor of shape (N, D), but is a {type(rows).__name__}")
    if rows.ndim != 2 or not rows.shape[1]:
        raise ShapeError(f"{name} must have shape (N, D), but has {tuple(rows.shape)}")
    is_float = rows.is_floating_point() if isinstance(rows, Tensor) else np.issubdtype(rows.dtype, np.floating)
    if not is_float:
        raise ShapeError(f"{name} must hold floats, but holds {rows.dtype}")
    if len(rows) < min_rows:
        raise ShapeError(f"{name} must have at least {min_rows} rows, but has {len(rows)}")
    for start in range(0, len(rows), 4096):
        piece = torch.as_tensor(rows[start : start + 4096])
        if not torch.isfinite(piece).all():
            row = start + int((~torch.isfinite(piece).all(dim=1)).nonzero()[0])
            raise ShapeError(f"{name} holds NaN or infinity, first in row {row}")
    return rows


def check_pair(first: Rows, second: Rows, min_rows: int = 1) -> None:
    """Check the two arguments of a distance between sets, `features_ref` and `features_sample`."""
    check_rows("features_ref", first, min_rows)
    check_rows("features_sample", second, min_rows)
    if first.shape[1] != second.shape[1]:
        raise ShapeError(
            f"features_ref has {first.shape[1]} columns, but features_sample has {second.shape[1]}",
            "both must come from the same network",
        )


def pieces(rows: Rows, size: int, device: torch.device | str = "cpu") -> Iterator[tuple[int, Tensor]]:
    """Yield (first row's number, float64 tensor of up to `size` rows)."""
    for start in range(0, len(rows), size):
        # two steps: converted before, twice the bytes would be sent
        yield start, torch.as_tensor(rows[start : start + size]).to(device).to(torch.float64)


def bring_near(rows: Rows, device: torch.device | str) -> Rows:
    """Return rows (N, D) that will be read many times: on a GPU, if they take no more than a gigabyte of its memory."""
    is_near = torch.device(device).type == "cuda" and rows.nbytes <= _NEAR_BYTES
    return torch.as_tensor(rows).to(device) if is_near else rows


def float64_device(device: torch.device | str = "cpu") -> torch.device:
    """Return `device`, or the CPU where `device` has no float64 (Apple GPUs)."""
    device = torch.device(device)
    return torch.device("cpu") if device.type == "mps" else device
