"""Tokenizers on disk: a folder with `weights.safetensors` and a manifest that holds config and fingerprint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from varcli import config as configs
from varcli.artifacts.manifest import Manifest, write_manifest
from varcli.artifacts.verify import read_checked_tensors, read_config, read_manifest, require_finite
from varcli.artifacts.weights import load_state, without_weights
from varcli.artifacts.write import prepare_folder, write_tensors
from varcli.errors import ConfigError
from varcli.tokenizer.base import TokenizerConfig
from varcli.tokenizer.vqvae import VQVAE

KIND = "tokenizer"
WEIGHTS_NAME = "weights.safetensors"
_USAGE = "quantizer.usage_KV"


def save_tokenizer(
    folder: Path, tokenizer: VQVAE, info: Mapping[str, Any] | None = None, dtype: torch.dtype | None = None
) -> Manifest:
    """Write a tokenizer folder and return its manifest.

    info: more JSON values for the manifest (source, data, metrics). dtype: storage type of the weights, e.g.
    torch.float16 for half the size; None keeps float32. With a dtype the fingerprint is that of the rounded weights,
    which are what a reader gets.
    """
    if tokenizer.is_decoder_rounded:
        raise ConfigError("a tokenizer whose decoder was rounded is not saved", "load it anew")
    state = {name: tensor.detach().cpu() for name, tensor in tokenizer.state_dict().items()}
    if dtype is not None:
        # counts may exceed what half precision holds
        state = {name: tensor if name == _USAGE else tensor.to(dtype) for name, tensor in state.items()}
        rounded = VQVAE(tokenizer.config)
        rounded.load_state_dict({name: tensor.float() for name, tensor in state.items()})
        tokenizer = rounded
    prepare_folder(folder, need_bytes=sum(tensor.nbytes for tensor in state.values()))
    write_tensors(folder / WEIGHTS_NAME, state)
    values = {
        "config": configs.to_dict(tokenizer.config),
        "fingerprint": tokenizer.fingerprint(),
        "image_size": tokenizer.config.image_size,
        **(info or {}),
    }
    return write_manifest(folder, KIND, values, files=[WEIGHTS_NAME])


def load_tokenizer(folder: Path, device: torch.device | str = "cpu") -> VQVAE:
    """Read a tokenizer folder in float32, ready for inference.

    Raises ArtifactError (IntegrityError for changed bytes) if it is not whole or its weights do not fit its config.
    """
    manifest = read_manifest(folder, KIND)
    config = read_config(folder, manifest, TokenizerConfig)
    with without_weights():
        tokenizer = VQVAE(config)
    state = read_checked_tensors(folder, WEIGHTS_NAME, manifest)
    require_finite(state, f"`{folder}`")
    load_state(tokenizer, {name: tensor.float() for name, tensor in state.items()}, folder, assign=True)
    return tokenizer.to(device).eval().requires_grad_(False)
