"""A tiny tokenizer on disk and a codes cache of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from toy_codes import write_codes

from varcli.tokenizer.store import save_tokenizer


@pytest.fixture
def tokenizer_folder(tmp_path: Path, tiny_tokenizer) -> Path:
    """The tiny tokenizer as a folder."""
    save_tokenizer(tmp_path / "tokenizer", tiny_tokenizer)
    return tmp_path / "tokenizer"


@pytest.fixture
def codes(tmp_path: Path, tiny_tokenizer) -> Path:
    """A cache of 40 training images of 2 views and 12 validation images in 3 classes; codes depend on the class."""
    return write_codes(tmp_path / "codes", tiny_tokenizer, torch.Generator().manual_seed(0))
