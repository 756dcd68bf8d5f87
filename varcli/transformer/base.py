"""The config of a transformer that predicts codes step by step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from varcli.errors import ConfigError
from varcli.scales import NAMED_SCHEDULES, PatchNums

_MOST_BLOCKS, _MOST = 1000, 2**20  # far beyond any model: a larger number is a mistake or malice, and would hang
_GAMMA_BY_DEPTH = ((20, 1e-3), (24, 1e-4), (30, 1e-5))
"""Start of the residual gates up to a depth, from the recipes of the released models; deeper ones take 5e-6."""


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Architecture of a transformer over generation steps; the defaults are VAR-d16 for 256 px (arXiv:2404.02905)."""

    step_lengths: tuple[int, ...] = PatchNums(NAMED_SCHEDULES["256"]).step_lengths  # tokens predicted at once, by step
    vocab_size: int = 4096  # codes to choose from, V
    code_channels: int = 32  # channels of the features read, Z
    num_classes: int = 1000  # classes; one more row stands for no class
    depth: int = 16  # blocks
    width: int = 1024  # channels of the residual stream, C
    num_heads: int = 16  # attention heads, n
    mlp_ratio: float = 4.0  # hidden channels of the feed-forward layers over width
    shared_adaln: bool = False  # one modulation layer for all blocks instead of one each; a third fewer weights
    qk_norm: bool = True  # queries and keys of unit length with a learned temperature a head
    norm_eps: float = 1e-6  # of every layer norm
    drop_path: float = 0.0  # chance to skip a residual branch in the last block, growing linearly from 0 in the first
    dropout: float = 0.0  # on the output of attention and feed-forward layers, while training
    init_std: float | None = None  # of linear and embedding weights; None is sqrt(1 / (3 * width))
    init_head: float = 0.02  # factor on the start of the output projection
    init_adaln: float = 0.5  # factor on the start of the modulation's scales and shifts
    init_adaln_gamma: float = 1e-3  # factor on the start of the modulation's gates

    def __post_init__(self) -> None:
        sizes = (self.vocab_size, self.code_channels, self.num_classes, self.depth, self.width, self.num_heads)
        if min(sizes) < 1:
            raise ConfigError("vocab_size, code_channels, num_classes, depth, width and num_heads must be at least 1")
        if (
            self.depth > _MOST_BLOCKS
            or max(sizes) > _MOST
            or self.mlp_ratio > _MOST / self.width
            or self.seq_len > _MOST
        ):
            raise ConfigError(
                f"depth is at most {_MOST_BLOCKS:,}, and codes, channels, classes and tokens are at most {_MOST:,} each"
            )
        if not self.step_lengths or min(self.step_lengths) < 1:
            raise ConfigError(f"step_lengths must be counts of at least 1, but are {self.step_lengths}")
        if self.width % self.num_heads:
            raise ConfigError(f"width {self.width} must be a multiple of num_heads {self.num_heads}")
        if self.mlp_ratio <= 0 or self.norm_eps <= 0:
            raise ConfigError("mlp_ratio and norm_eps must be above 0")
        if not 0 <= self.drop_path < 1 or not 0 <= self.dropout < 1:
            raise ConfigError("drop_path and dropout are chances from 0 to below 1")

    @classmethod
    def from_depth(cls, depth: int, **changes: Any) -> TransformerConfig:
        """Return the paper's model of `depth` blocks: width 64 * depth, `depth` heads, drop path 0.1 * depth / 24.

        changes: fields to set otherwise, such as step_lengths or num_classes.
        """
        gamma = next((gamma for limit, gamma in _GAMMA_BY_DEPTH if depth <= limit), 5e-6)
        values = {
            "depth": depth,
            "width": 64 * depth,
            "num_heads": depth,
            "drop_path": min(0.1 * depth / 24, 0.9),
            "init_adaln_gamma": gamma,
        }
        return cls(**{**values, **changes})

    @property
    def seq_len(self) -> int:
        """Tokens of all steps, L."""
        return sum(self.step_lengths)

    @property
    def num_steps(self) -> int:
        """Steps until every code is predicted."""
        return len(self.step_lengths)

    @property
    def head_width(self) -> int:
        """Channels of one attention head, d."""
        return self.width // self.num_heads

    @property
    def hidden_width(self) -> int:
        """Hidden channels of the feed-forward layers."""
        return round(self.width * self.mlp_ratio)
