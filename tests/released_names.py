"""Models under the released code's names, for tests that read such files."""

from __future__ import annotations

from torch import Tensor

from varcli.interop.names import tokenizer_names, transformer_buffers, transformer_names
from varcli.tokenizer import VQVAE
from varcli.transformer import Transformer


def released_tokenizer_state(tokenizer: VQVAE) -> dict[str, Tensor]:
    """A tokenizer's tensors as the released code names them."""
    names = tokenizer_names(tokenizer.state_dict(), tokenizer.config.num_phis)
    return {names[name]: tensor for name, tensor in tokenizer.state_dict().items()}


def released_transformer_state(transformer: Transformer) -> dict[str, Tensor]:
    """A transformer's tensors as the released code names them, computed ones included."""
    names = transformer_names(transformer.state_dict())
    state = {names[name]: tensor for name, tensor in transformer.state_dict().items()}
    return state | transformer_buffers(transformer.config)
