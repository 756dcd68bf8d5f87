"""The walk through all steps of a generation, with cached keys and values."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from varcli.devices import autocast
from varcli.order.base import Order
from varcli.sampling.choose import Choose
from varcli.sampling.settings import SampleConfig
from varcli.transformer import Transformer


@torch.no_grad()
def walk_steps(
    transformer: Transformer, order: Order, labels_B: Tensor, choose: Choose, config: SampleConfig, dtype: torch.dtype
) -> Iterator[Any]:
    """Yield the order's state after each step; dtype: of matrix products.

    With guidance each image has a second row, of no class, until no later step is guided.
    """
    device, batch = labels_B.device, len(labels_B)
    strengths = config.guidance(len(order.step_lengths))
    rows = labels_B
    if any(strengths):
        rows = torch.cat((labels_B, torch.full_like(labels_B, transformer.config.num_classes)))
    state, x_BlZ = order.start(batch, device), None
    with autocast(device, dtype):
        cache = transformer.start_cache(rows)
    for step, strength in enumerate(strengths):
        if len(rows) > batch and not any(strengths[step:]):
            rows, cache = labels_B, cache.first(batch)
        with autocast(device, dtype):
            logits_RlV = transformer.step(x_BlZ, cache)
            wanted_BlV, unwanted_BlV = logits_RlV[:batch], logits_RlV[batch:] if strength else None
            state, x_BlZ = order.advance(state, step, choose(step, wanted_BlV, unwanted_BlV, strength))
        yield state
