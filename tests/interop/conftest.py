"""The tiny models under the released code's names."""

from __future__ import annotations

import pytest
import torch
from released_names import released_tokenizer_state, released_transformer_state


@pytest.fixture
def tokenizer_state(tiny_tokenizer):
    return released_tokenizer_state(tiny_tokenizer)


@pytest.fixture
def transformer_state(tiny_transformer):
    return released_transformer_state(tiny_transformer)


@pytest.fixture
def trainer_checkpoint(tokenizer_state, transformer_state):
    """What the released trainer saves, optimizer and notes included."""
    optimizer = {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-4, "params": [0]}]}
    return {
        "epoch": 7,
        "iter": 0,
        "args": {"depth": 2, "pn": "1_2_4"},
        "trainer": {
            "config": {"patch_nums": (1, 2, 4), "resos": (8, 16, 32), "label_smooth": 0.0},
            "var_wo_ddp": transformer_state,
            "vae_local": tokenizer_state,
            "var_opt": {"optimizer": optimizer},
        },
    }
