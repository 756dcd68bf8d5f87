"""Tiny models and images that every room's tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked gpu where there is none, and tests marked network unless VARCLI_TEST_NETWORK is set."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked:
        import torch

        if not torch.cuda.is_available():
            for item in marked:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
    if not os.environ.get("VARCLI_TEST_NETWORK"):
        for item in items:
            if item.get_closest_marker("network"):
                item.add_marker(pytest.mark.skip(reason="VARCLI_TEST_NETWORK is not set"))


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """Keep float sums repeatable and leave the other core to the other test worker."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture
def tiny_tokenizer():
    """A random f8 tokenizer for 32 px: patch_nums (1, 2, 4), 16 codes of 8 channels; about 0.5 M parameters."""
    import torch

    from varcli.tokenizer import VQVAE, TokenizerConfig

    torch.manual_seed(0)
    config = TokenizerConfig(
        patch_nums=(1, 2, 4),
        vocab_size=16,
        code_channels=8,
        width=32,
        channel_multipliers=(1, 1, 1, 1),
        num_res_blocks=1,
        num_phis=2,
    )
    return VQVAE(config).eval()


@pytest.fixture
def tiny_transformer():
    """A random transformer for `tiny_tokenizer` with 3 classes: depth 2, width 64."""
    import torch

    from varcli.transformer import Transformer, TransformerConfig

    torch.manual_seed(1)
    config = TransformerConfig(
        step_lengths=(1, 4, 16), vocab_size=16, code_channels=8, num_classes=3, depth=2, width=64, num_heads=2
    )
    return Transformer(config).eval()


@pytest.fixture
def tiny_images(tmp_path: Path) -> Path:
    """An image tree with train/ and val/: 3 classes of coloured 32 px PNGs, 5 and 2 a class."""
    from small_sets import write_tiny_images

    return write_tiny_images(tmp_path / "images")
