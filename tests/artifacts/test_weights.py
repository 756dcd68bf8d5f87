"""Weights into modules: what is read is not drawn first."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

import torch

import varcli
from varcli.artifacts.weights import without_weights
from varcli.tokenizer.store import load_tokenizer, save_tokenizer
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


def test_modules_may_be_built_without_weights_in_two_threads_at_once(tiny_transformer):
    """torch keeps the device to return to for all threads together: it once could end as meta for good."""
    both_are_there = threading.Barrier(2)

    def build() -> None:
        both_are_there.wait()
        for _ in range(50):
            with without_weights():
                time.sleep(1e-4)

    threads = [threading.Thread(target=build) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.get_default_device() == torch.device("cpu") and not torch.zeros(1).is_meta


def test_a_tokenizer_is_read_without_drawing_and_whole(tiny_tokenizer, tmp_path):
    save_tokenizer(tmp_path / "tokenizer", tiny_tokenizer)
    before = torch.get_rng_state()
    found = load_tokenizer(tmp_path / "tokenizer")
    assert torch.equal(torch.get_rng_state(), before)
    for name, buffer in tiny_tokenizer.named_buffers():  # those that are not saved, too
        assert torch.equal(found.get_buffer(name), buffer), name
    for name, parameter in tiny_tokenizer.named_parameters():
        assert torch.equal(found.get_parameter(name), parameter), name


def test_a_model_is_loaded_and_draws_without_torchs_compiler():
    """It took half the time from the process's start to the first picture."""
    code = (
        "import sys; from varcli import Generator; g = Generator.load('emoji64', 'cpu'); g.sample([0]);"
        "sys.exit(bool({'torch._dynamo', 'torch._inductor'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", code], cwd=Path(varcli.__file__).parents[1], check=True)
