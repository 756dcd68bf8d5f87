"""The shape letters used as suffixes of tensor names, and the checks that speak them.

B batch, K scales, L all tokens, l tokens of one step, C width, D condition width, Z code channels,
V vocabulary, H W pixels, h w latent grid, n heads, d head width. Example: `logits_BlV = head(x_BlC)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from varcli.errors import ShapeError


def check_shape(name: str, tensor: Any, expected: Sequence[int | str]) -> None:
    """Raise ShapeError unless `tensor` has `expected` dimensions.

    expected: one entry a dimension; an int must match, a letter such as "B" stands for any size.
    """
    shape = tuple(tensor.shape)
    fits = len(shape) == len(expected) and all(
        isinstance(want, str) or want == have for want, have in zip(expected, shape, strict=True)
    )
    if not fits:
        wanted = "(" + ", ".join(str(entry) for entry in expected) + ")"
        raise ShapeError(f"{name} must have shape {wanted}, but has {shape}")
