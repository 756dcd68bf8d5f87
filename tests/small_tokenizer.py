"""The smallest architecture that still has every part: what tests train."""

from __future__ import annotations

from varcli.tokenizer import TokenizerConfig

SMALL = TokenizerConfig(
    patch_nums=(1, 2, 4),
    vocab_size=16,
    code_channels=8,
    width=8,
    channel_multipliers=(1, 1, 1, 1),
    num_res_blocks=1,
    norm_groups=2,
)
