"""What training leaves out at random: classes, which guidance needs, and whole branches of blocks (stochastic depth)."""

from __future__ import annotations

import torch
from torch import Tensor

from varcli.transformer.base import TransformerConfig


def drop_labels(labels_B: Tensor, num_classes: int, rate: float, generator: torch.Generator | None = None) -> Tensor:
    """Replace each label by `num_classes`, which stands for no class, with chance `rate`.

    generator: on the labels' device; None uses torch's own. Classifier-free guidance needs the result in training.
    """
    dropped_B = torch.rand(labels_B.shape, generator=generator, device=labels_B.device) < rate
    return torch.where(dropped_B, num_classes, labels_B)


def drop_branches(
    config: TransformerConfig, batch_size: int, generator: torch.Generator | None, device: torch.device
) -> Tensor | None:
    """Draw stochastic depth for a batch: factors (depth, 2, B), float32, on the gates of attention and feed-forward.

    A branch is closed with a chance that rises from 0 in the first block to `config.drop_path` in the last, and the others
    open wider to keep the mean. None if nothing is ever closed. generator: on `device`; None uses torch's own.
    """
    if config.drop_path == 0 or config.depth == 1:
        return None
    keep = torch.linspace(1, 1 - config.drop_path, config.depth, device=device)[:, None, None]
    drawn = torch.rand(config.depth, 2, batch_size, generator=generator, device=device)
    return (drawn < keep) / keep
