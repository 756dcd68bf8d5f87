"""Fine-tuning a transformer: the one that its training starts from, what may differ from it, and which parts may rest."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from varcli import config as configs
from varcli.artifacts.find import artifact_folder
from varcli.artifacts.verify import read_manifest
from varcli.data.classes import ClassNames
from varcli.errors import ArtifactError, ConfigError, unknown_name
from varcli.training.frozen import freeze, refuse_frozen_start
from varcli.training.parent import Parent
from varcli.transformer import Transformer, TransformerConfig
from varcli.transformer.store import KIND, load_transformer

PARTS = {
    "classes": ("class_embedding",),
    "embeddings": ("start_position", "positions", "step_embedding", "input_projection"),
    "blocks": ("blocks", "shared_modulation"),
    "head": ("head_modulation", "output_projection"),
}
"""What may be frozen, and its modules and parameters; `blocks:1-8` are the first eight blocks alone."""

_SETTINGS = ("depth", "width", "num_heads", "mlp_ratio", "shared_adaln")  # of TrainConfig, that the parent decides
_SHAPES = (*_SETTINGS, "qk_norm", "norm_eps", "vocab_size", "code_channels")  # what must be equal, beside step_lengths
_RANGE = re.compile(r"blocks:(\d+)-(\d+)")  # counted from 1, both ends included


@dataclass(frozen=True, kw_only=True)
class TransformerParent(Parent):
    """The transformer that a run was begun with."""

    config: TransformerConfig | None = None  # its architecture; None if the run has weights of its own already
    classes: ClassNames | None = None  # names of its classes, of which the released models' are ImageNet's
    tokenizer: str | None = None  # fingerprint of the tokenizer whose codes it predicts

    def settings(self, asked: Collection[str]) -> dict[str, Any]:
        """Return its settings of TrainConfig that are not among `asked`, the names of those that somebody set."""
        if self.config is None:
            return {}
        return {name: getattr(self.config, name) for name in _SETTINGS if name not in asked}

    def require_fit(self, wanted: TransformerConfig) -> None:
        """Raise ConfigError naming all that keeps these weights from being a start for `wanted`: other shapes or meanings.

        Classes may differ, and what acts in training alone.
        """
        if self.config is None:
            return
        steps = [(config.step_lengths, config.seq_len, config.num_steps) for config in (self.config, wanted)]
        differences = [f"{steps[0][1]:,} tokens in {steps[0][2]} steps, not {steps[1][1]:,} in {steps[1][2]}"]
        differences = differences if steps[0] != steps[1] else []
        differences += [
            f"{name} {getattr(self.config, name)}, not {getattr(wanted, name)}"
            for name in _SHAPES
            if getattr(self.config, name) != getattr(wanted, name)
        ]
        if differences:
            raise ConfigError(
                f"the transformer to start from does not fit these codes and settings: it has {'; '.join(differences)}",
                "leave out settings that it decides (depth, width, ...), and pass codes of a tokenizer with its scales",
            )


def read_parent(given: Path | str) -> TransformerParent:
    """Read what there is to know of the transformer behind a path or name, but for its weights.

    given: a transformer, model or run folder. Raises ArtifactError if it is none, or predicts in another order.
    """
    folder = artifact_folder(given, KIND)
    manifest = read_manifest(folder, KIND)
    info = manifest.info
    if not isinstance(info.get("config"), dict):
        raise ArtifactError(f"the manifest of `{folder}` holds no transformer config", "restore it, or import it again")
    if info.get("order", "scale") != "scale":
        raise ArtifactError(f"`{folder}` predicts codes in the order `{info['order']}`, not scale by scale")
    config = configs.from_dict(TransformerConfig, info["config"])
    return TransformerParent(
        fingerprint=manifest.digest[:16],
        folder=folder,
        config=config,
        classes=ClassNames.of(info.get("classes"), config.num_classes),
        tokenizer=info.get("tokenizer"),
    )


def remember_parent(fingerprint: str, config: Mapping[str, Any]) -> TransformerParent:
    """Return the parent of a run that has weights of its own."""
    return TransformerParent(fingerprint=fingerprint, folder=None)


def begin(
    model: Transformer, parent: TransformerParent | None, frozen: Sequence[str], classes: Sequence[str], tokenizer: str
) -> tuple[list[nn.Module], tuple[str, ...]]:
    """Let a newly drawn model start from a parent, and freeze parts of it; return their modules and what to tell.

    classes: names of the model's classes. tokenizer: fingerprint of that whose codes it will learn. A parent behind a
    checkpoint gives nothing but leave to freeze. Raises ConfigError for what does not fit, ArtifactError for weights that
    are not whole.
    """
    refuse_frozen_start(frozen, KIND, parent is not None)
    notes: list[str] = []
    if parent is not None and parent.folder is not None:
        parent.require_fit(model.config)
        num_known = load_parent(model, parent, classes)
        if num_known < len(classes) and "classes" in frozen:
            raise ConfigError(
                f"the classes cannot be frozen: `{parent.folder}` knows {num_known:,} of the {len(classes):,} by name",
                "leave classes out of `frozen`",
            )
        notes.append(f"starts from {parent.folder}, which knows {num_known:,} of the {len(classes):,} classes by name")
        if parent.tokenizer != tokenizer:
            notes.append(
                "the transformer to start from learned another tokenizer's codes: little of it means anything here"
            )
    if frozen:
        notes.append(f"stay as they are: {', '.join(frozen)}")
    return freeze_parts(model, frozen), tuple(notes)


def match_classes(before: ClassNames, now: ClassNames) -> dict[int, int]:
    """Return the row of `before` for each row of `now` that has its name; of equal names the first is the first.

    The thousand folder names of ImageNet go by ImageNet's names, which the released models know. Numbers in place of names
    that nobody gave match nothing.
    """
    if before.are_made_up or now.are_made_up:
        return {}
    rows = defaultdict(list)
    for row in range(len(before)):
        rows[before.label(row)].append(row)
    return {row: rows[now.label(row)].pop(0) for row in range(len(now)) if rows[now.label(row)]}


@torch.no_grad()
def load_parent(model: Transformer, parent: TransformerParent, classes: Sequence[str]) -> int:
    """Put a parent's weights into a model that `TransformerParent.require_fit` allowed; return how many classes it knew.

    classes: names of the model's. Rows of the class embedding go by them; those that the parent does not know stay as they
    were drawn, and the last row, which stands for no class, is taken over. Raises ArtifactError for weights that are not
    whole.
    """
    weights, _ = load_transformer(parent.folder)
    state = weights.state_dict()
    known, rows = state["class_embedding.weight"], model.class_embedding.weight.clone()
    found = match_classes(parent.classes, ClassNames(classes))
    rows[-1] = known[-1]
    for row, before in found.items():
        rows[row] = known[before]
    model.load_state_dict({**state, "class_embedding.weight": rows})
    return len(found)


def freeze_parts(model: Transformer, names: Sequence[str]) -> list[nn.Module]:
    """Let parts of a transformer learn no more; return their modules, for `learn`.

    Raises ConfigError for a name that is no part of it, or if nothing is left to learn.
    """
    depth, found = model.config.depth, []
    for name in names:
        match = _RANGE.fullmatch(name)
        if match is None and name not in PARTS:
            raise unknown_name("part to freeze", name, [*PARTS, f"blocks:1-{depth}"])
        if match is None:
            found += [entry for entry in PARTS[name] if getattr(model, entry) is not None]
        elif 1 <= int(match[1]) <= int(match[2]) <= depth:
            found += [f"blocks.{index}" for index in range(int(match[1]) - 1, int(match[2]))]
        else:
            raise ConfigError(f"there are no `{name}`: the {depth} blocks are counted from 1", "e.g. blocks:1-2")
    modules = freeze(model, found)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError(f"with {', '.join(names)} frozen nothing is left to learn", "leave one out of `frozen`")
    return modules
