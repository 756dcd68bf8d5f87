"""What a file of the released VAR code holds: bare weights, or a trainer's checkpoint with both models."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from varcli.artifacts.foreign import read_foreign
from varcli.errors import ArtifactError

State = Mapping[str, Tensor]

_LAYOUTS = "weights by name, or a trainer checkpoint with trainer.var_wo_ddp and trainer.vae_local"
_FLAT_PART = re.compile(r"^(?:trainer\.)?(var_wo_ddp|vae_local|var_opt)\.(.+)$")
_QUANTIZER, _TOKENIZER = "quantize.", ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
_TRANSFORMER = ("pos_start", "pos_1LC", "word_embed.", "class_emb.", "blocks.", "head.", "head_nm.", "shared_ada_lin.")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """State dicts found in one file or mapping, under the released code's names."""

    where: str  # for messages: the file, or "the state dict"
    layout: str  # "weights" or "trainer checkpoint"
    tokenizer: State | None = None
    quantizer: State | None = None
    transformer: State | None = None
    patch_nums: tuple[int, ...] | None = None  # as the trainer noted them

    @property
    def content(self) -> str:
        """Say what is in it."""
        parts = {"a VQVAE": self.tokenizer, "a quantizer": self.quantizer, "a VAR transformer": self.transformer}
        return " and ".join(name for name, state in parts.items() if state is not None)


def read_checkpoint(source: str | os.PathLike[str] | Mapping[str, Any]) -> Checkpoint:
    """Find the state dicts in a `.pth` or safetensors file, or in a mapping that was read from one.

    Takes bare weights, trainer checkpoints, the latter's names flattened as safetensors need them, and names that
    torch.compile prefixed. Raises UnsafeFileError and ArtifactError as `read_foreign`, and ArtifactError if the content
    is something else.
    """
    if isinstance(source, Mapping):
        return _classify(source, "the state dict")
    return _classify(read_foreign(Path(source)), str(source))


def kind_of(names: Iterable[str]) -> str | None:
    """Say by their names what weights are: "tokenizer", "quantizer", "transformer", or None for something else."""
    names = list(names)
    if any(name.startswith(_TRANSFORMER) for name in names):
        return "transformer"
    if any(name.startswith(_TOKENIZER) for name in names):
        return "tokenizer"
    return "quantizer" if any(name.startswith(_QUANTIZER) for name in names) else None


def _classify(value: Mapping[str, Any], where: str) -> Checkpoint:
    trainer = value.get("trainer", value)
    if isinstance(trainer, Mapping) and any(
        isinstance(trainer.get(key), Mapping) for key in ("var_wo_ddp", "vae_local")
    ):
        notes = trainer.get("config")
        sides = notes.get("patch_nums") if isinstance(notes, Mapping) else None
        return _trainer_checkpoint(trainer.get("var_wo_ddp"), trainer.get("vae_local"), where, sides)
    flat: dict[str, dict[str, Any]] = {}
    for name, entry in value.items():
        if part := _FLAT_PART.match(str(name)):
            flat.setdefault(part[1], {})[part[2]] = entry
    if flat:
        return _trainer_checkpoint(flat.get("var_wo_ddp"), flat.get("vae_local"), where)
    state = _clean(value, where)
    kind = kind_of(state)
    if kind is None:
        shown = ", ".join(f"`{name}`" for name in list(state)[:3]) or "nothing"
        raise ArtifactError(f"`{where}` holds no weights of VAR or its VQVAE, but {shown}", f"expected: {_LAYOUTS}")
    return Checkpoint(where=where, layout="weights", **{kind: state})


def _trainer_checkpoint(transformer: Any, tokenizer: Any, where: str, sides: Any = None) -> Checkpoint:
    whole = isinstance(sides, (list, tuple)) and all(isinstance(side, int) for side in sides)
    return Checkpoint(
        where=where,
        layout="trainer checkpoint",
        tokenizer=None if tokenizer is None else _clean(tokenizer, where),
        transformer=None if transformer is None else _clean(transformer, where),
        patch_nums=tuple(sides) if whole else None,
    )


def _clean(value: Any, where: str) -> dict[str, Tensor]:
    """Return name -> tensor without torch.compile's prefixes. Raises ArtifactError if anything else is among them."""
    state: dict[str, Tensor] = {}
    for name, entry in value.items() if isinstance(value, Mapping) else [("", value)]:
        if not isinstance(name, str) or not isinstance(entry, Tensor):
            raise ArtifactError(
                f"`{where}` holds a {type(entry).__name__} under `{name}`, where a tensor should be",
                f"expected: {_LAYOUTS}",
            )
        plain = name.replace("_orig_mod.", "")
        if plain in state:
            raise ArtifactError(f"`{where}` holds `{plain}` twice, once compiled", f"expected: {_LAYOUTS}")
        state[plain] = entry
    return state
