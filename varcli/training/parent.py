"""Fine-tuning: the tokenizer that a training of another one starts from, and what may differ from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from varcli import config as configs
from varcli.artifacts.verify import read_manifest
from varcli.errors import ArtifactError, ConfigError
from varcli.tokenizer import VQVAE, TokenizerConfig
from varcli.tokenizer.find import tokenizer_folder
from varcli.tokenizer.store import KIND
from varcli.training.run import RunFolder

_MAY_DIFFER = {"patch_nums", "dropout", "commitment_weight"}  # no weight's shape or meaning hangs on them


@dataclass(frozen=True, kw_only=True)
class Parent:
    """The tokenizer that a run was begun with."""

    fingerprint: str  # of it
    config: TokenizerConfig  # its architecture; of a run that goes on, the run's own
    folder: Path | None  # where it lies; None if the run has weights of its own already

    def inherit(self, asked: Mapping[str, Any]) -> TokenizerConfig:
        """Return this architecture with the settings of `asked`.

        Raises ConfigError for one that the weights do not allow: all but patch_nums, which chooses the resolution and is
        free as long as every scale finds its phi, dropout and commitment_weight.
        """
        wanted = configs.replace(self.config, asked)
        for name in sorted(asked.keys() - _MAY_DIFFER):
            if getattr(wanted, name) != getattr(self.config, name):
                raise ConfigError(
                    f"tokenizer.{name} is {getattr(self.config, name)} in the tokenizer to start from, but "
                    f"{getattr(wanted, name)} is asked for",
                    f"leave it out: with --init-from only {', '.join(sorted(_MAY_DIFFER))} may be changed",
                )
        now, before = wanted.scales.num_scales, self.config.scales.num_scales
        if self.config.num_phis == 0 and self.config.phi_residual and now != before:
            raise ConfigError(
                f"patch_nums has {now} scales, but the tokenizer to start from has a phi of its own for each of its {before}",
                f"choose {before} scales",
            )
        return wanted


def find_parent(run: RunFolder, init_from: Path | str | None) -> Parent | None:
    """Return what a run starts or was started from; None if that is nothing.

    init_from: as `tokenizer_folder` takes it. A run with a checkpoint does not need it again; if it is given and still
    there it must be the same. Raises ConfigError if it is another one than the run's, ArtifactError if there is none.
    """
    known = None if run.stored is None else run.stored.get("inputs", {}).get("init_from")
    if run.checkpoint is None:
        if init_from is None and known is not None:
            raise ConfigError(
                f"`{run.path}` was begun from the tokenizer {known}, and has no checkpoint yet",
                "name it again with --init-from, or choose another --out",
            )
        return None if init_from is None else _open(init_from)
    if init_from is not None:
        try:
            found = _open(init_from).fingerprint
        except ArtifactError:
            found = known or str(init_from)
        if found != known:
            begun = f"from the tokenizer {known}" if known else "without --init-from"
            raise ConfigError(
                f"`{run.path}` was begun {begun}, but `{init_from}` is {found}", "choose another --out for a new run"
            )
    if known is None or run.config is None:
        return None
    return Parent(fingerprint=known, config=configs.from_dict(TokenizerConfig, run.config["tokenizer"]), folder=None)


@torch.no_grad()
def load_parent(model: VQVAE, parent: VQVAE, batch_size: int | None) -> None:
    """Put the weights and usage counts of `parent` into a model whose config its own allowed (`Parent.inherit`).

    batch_size: images that are counted in each step from now on, to which the counts are scaled; None keeps them.
    Scales that the parent does not have begin with the counts of all of its own.
    """
    usage_KV, scales = parent.quantizer.usage_KV, model.quantizer.scales
    is_same = usage_KV.shape == model.quantizer.usage_KV.shape
    if batch_size is not None or not is_same:
        counts_KV = usage_KV if is_same else usage_KV.sum(dim=0).expand(scales.num_scales, -1)
        picks_K = torch.tensor(scales.step_lengths) * (batch_size or 1)
        # counts that are all zero, as of weights from elsewhere, stay so: the first steps count anew
        usage_KV = counts_KV / counts_KV.sum(dim=1, keepdim=True).clamp(min=1e-12) * picks_K.unsqueeze(1)
    model.load_state_dict({**parent.state_dict(), "quantizer.usage_KV": usage_KV})


def _open(given: Path | str) -> Parent:
    folder = tokenizer_folder(given)
    info = read_manifest(folder, KIND).info
    if not isinstance(info.get("config"), dict) or not isinstance(info.get("fingerprint"), str):
        raise ArtifactError(f"the manifest of `{folder}` holds no tokenizer config", "restore it, or import it again")
    config = configs.from_dict(TokenizerConfig, info["config"])
    return Parent(fingerprint=info["fingerprint"], config=config, folder=folder)
