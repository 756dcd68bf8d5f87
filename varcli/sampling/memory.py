"""How many images fit a device at once: to draw, and to decode."""

from __future__ import annotations

import torch

from varcli.tokenizer import TokenizerConfig
from varcli.transformer import TransformerConfig

_MOST_DRAWN = 256  # images drawn at once on a GPU
_MOST_ELSEWHERE = 512
_MAX_NOISE = 2**26  # numbers of one step's noise, elsewhere: bounds what a batch takes besides the model
_MOST_DECODED = 32  # images decoded at once on a GPU
_USABLE = 0.8  # of the free memory; the rest is fragmentation and workspaces
_MAPS = 12  # full-resolution maps of the decoder's width that decoding an image needs at its peak
_NOISES = 4  # tensors of noise at once, with smooth vectors
_WIDTHS = 16  # vectors of the transformer's width that a token needs while a block computes it, beside the hidden ones


def image_bytes(config: TransformerConfig, dtype: torch.dtype, is_guided: bool, is_smooth: bool = False) -> int:
    """Estimate what drawing one image takes beside the weights: keys and values, the last step's activations, its logits.

    is_smooth: noise is then a tensor, of 8 bytes a number, a few times over.
    """
    rows, last = 2 if is_guided else 1, config.step_lengths[-1]
    cached = 2 * (config.depth * (config.seq_len - last) + last) * config.width
    active = last * (_WIDTHS * config.width + 2 * config.hidden_width + config.vocab_size)
    noise = _NOISES * 8 * last * config.vocab_size if is_smooth else 0
    return rows * (cached + active) * dtype.itemsize + noise


def decode_bytes(config: TokenizerConfig, dtype: torch.dtype) -> int:
    """Estimate what decoding one image takes."""
    return _MAPS * config.image_size**2 * config.width * dtype.itemsize


def choose_batch_size(config: TransformerConfig, bytes_an_image: int, device: torch.device) -> int:
    """Return how many images to draw at once: as many as the free memory of a GPU holds, and are worth it.

    A round number, so that a little more or less memory does not change it.
    """
    if device.type != "cuda":
        return max(1, min(_MOST_ELSEWHERE, _MAX_NOISE // (max(config.step_lengths) * config.vocab_size)))
    size = max(1, min(_MOST_DRAWN, int(_room(device) / bytes_an_image)))
    unit = next((unit for unit in (_MOST_DECODED, 8) if size >= unit), 1)
    return size // unit * unit


def choose_decode_chunk(batch: int, tokenizer: TokenizerConfig, dtype: torch.dtype, device: torch.device) -> int:
    """Return how many of `batch` images to decode at once, if possible a divisor, so that all pieces have one shape.

    On a CPU one: convolutions round differently in another batch, and equal codes shall give equal bytes.
    """
    if device.type == "cpu":
        return 1
    most = min(batch, _MOST_DECODED)
    if device.type == "cuda":
        most = max(
            1, min(most, int(_room(device) / decode_bytes(tokenizer, dtype)))
        )  # keys and values are gone by then
    even = next(size for size in range(most, 0, -1) if batch % size == 0)
    return even if 2 * even >= most else most


def _room(device: torch.device) -> float:
    """Memory of a GPU that may be used: free, or held by torch and not in use."""
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return _USABLE * (torch.cuda.mem_get_info(device)[0] + held)
