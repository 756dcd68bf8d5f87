"""Transformers on disk: a folder with `weights.safetensors` and a manifest that names the tokenizer they belong to."""

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
from varcli.kernels.fp8 import require_fp8
from varcli.transformer.base import TransformerConfig
from varcli.transformer.model import Transformer

KIND = "transformer"
WEIGHTS_NAME = "weights.safetensors"


def save_transformer(
    folder: Path, model: Transformer, info: Mapping[str, Any], dtype: torch.dtype | None = None
) -> Manifest:
    """Write a transformer folder and return its manifest.

    info: JSON values for the manifest; "tokenizer" (fingerprint of the tokenizer whose codes it predicts),
    "patch_nums" and "order" must be there, "classes" (names by index) and others may.
    dtype: storage type of the weights, e.g. torch.float16 for half the size; None keeps theirs.
    Raises ArtifactError if the folder cannot be written, ConfigError for a model that is kept in FP8.
    """
    if model.is_kept_in_fp8:
        raise ConfigError("a transformer whose weights were rounded to FP8 is not saved", "load it without fp8")
    missing = [key for key in ("tokenizer", "patch_nums", "order") if key not in info]
    assert not missing, f"a transformer's manifest needs {missing}"
    state = {name: tensor.detach().to("cpu", dtype or tensor.dtype) for name, tensor in model.state_dict().items()}
    folder = prepare_folder(folder, need_bytes=sum(tensor.nbytes for tensor in state.values()))
    write_tensors(folder / WEIGHTS_NAME, state)
    return write_manifest(folder, KIND, {"config": configs.to_dict(model.config), **info}, files=[WEIGHTS_NAME])


def load_transformer(
    folder: Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, fp8: bool = False
) -> tuple[Transformer, Manifest]:
    """Read a transformer folder, ready for inference, with its manifest.

    dtype: what matrix products are computed in, see `Transformer.keep_products_in`; the device never holds more than that
    and one layer as it is in the file.
    fp8: those of the blocks are computed in FP8 beside it, see `Transformer.keep_in_fp8`.
    Raises ArtifactError (IntegrityError for changed bytes) if it is not whole or its weights do not fit its config,
    ConfigError where there is no FP8.
    """
    manifest = read_manifest(folder, KIND)
    config = read_config(folder, manifest, TransformerConfig)
    if fp8:
        require_fp8(torch.device(device), dtype, config.width, config.hidden_width)
    with without_weights():
        model = Transformer(config)
    load_state(model, read_checked_tensors(folder, WEIGHTS_NAME, manifest), folder, assign=True)
    if dtype == torch.float32:
        model.float()
    if fp8:
        model.keep_in_fp8(torch.device(device))
    elif dtype != torch.float32:
        model.keep_products_in(dtype, torch.device(device))
    model = model.to(device).eval().requires_grad_(False)
    hint = "the training that made it diverged"
    if dtype == torch.float16:
        hint += ", or its numbers are beyond what fp16 holds: use --precision bf16"
    require_finite(model.state_dict(), f"`{folder}`", hint)  # on the device: half a second for a gigabyte on a CPU
    return model, manifest
