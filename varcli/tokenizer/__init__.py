"""Images to codes and back."""

from varcli.tokenizer.base import Tokenizer, TokenizerConfig
from varcli.tokenizer.vqvae import VQVAE

TOKENIZERS = {"multi-scale": VQVAE}
"""Every kind of tokenizer by name; the contract tests run over this table."""

__all__ = ["TOKENIZERS", "VQVAE", "Tokenizer", "TokenizerConfig"]
