"""Weights into modules: what is read is not drawn first."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

import varcli
from varcli.artifacts.weights import without_weights
from varcli.transformer import Transformer


def test_a_module_without_weights_draws_nothing_and_has_all_shapes(tiny_transformer):
    before = torch.get_rng_state()
    with without_weights():
        empty = Transformer(tiny_transformer.config)
    assert torch.equal(torch.get_rng_state(), before)
    shapes = {name: tensor.shape for name, tensor in tiny_transformer.state_dict().items()}
    assert {name: tensor.shape for name, tensor in empty.state_dict().items()} == shapes
    assert all(tensor.is_meta for tensor in empty.state_dict().values())
    assert not torch.randn(1).is_meta


def test_a_model_is_loaded_and_draws_without_torchs_compiler():
    """It took half the time from the process's start to the first picture."""
    code = (
        "import sys; from varcli import Generator; g = Generator.load('emoji64', 'cpu'); g.sample([0]);"
        "sys.exit(bool({'torch._dynamo', 'torch._inductor'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", code], cwd=Path(varcli.__file__).parents[1], check=True)
