"""Codes so far to the logits of the next step. Knows integers and tensors, neither tokenizer nor order."""

from varcli.transformer.base import TransformerConfig
from varcli.transformer.drops import drop_branches, drop_labels
from varcli.transformer.model import Transformer

__all__ = ["Transformer", "TransformerConfig", "drop_branches", "drop_labels"]
