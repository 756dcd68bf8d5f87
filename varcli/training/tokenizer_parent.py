"""Fine-tuning a tokenizer: the one that its training starts from, and what may differ from it."""

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
from varcli.training.parent import Parent

_MAY_DIFFER = {"patch_nums", "dropout", "commitment_weight"}  # no weight's shape or meaning hangs on them


@dataclass(frozen=True, kw_only=True)
class TokenizerParent(Parent):
    """The tokenizer that a run was begun with."""

    config: TokenizerConfig  # its architecture; of a run that goes on, the run's own

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


def read_parent(given: Path | str) -> TokenizerParent:
    """Read what there is to know of the tokenizer behind `given`, as `tokenizer_folder` takes it, but for its weights."""
    folder = tokenizer_folder(given)
    info = read_manifest(folder, KIND).info
    if not isinstance(info.get("config"), dict) or not isinstance(info.get("fingerprint"), str):
        raise ArtifactError(f"the manifest of `{folder}` holds no tokenizer config", "restore it, or import it again")
    config = configs.from_dict(TokenizerConfig, info["config"])
    return TokenizerParent(fingerprint=info["fingerprint"], config=config, folder=folder)


def remember_parent(fingerprint: str, config: Mapping[str, Any]) -> TokenizerParent:
    """Return the parent of a run that has weights of its own; config: the run's."""
    own = configs.from_dict(TokenizerConfig, config["tokenizer"])
    return TokenizerParent(fingerprint=fingerprint, config=own, folder=None)


@torch.no_grad()
def load_parent(model: VQVAE, parent: VQVAE, batch_size: int | None) -> None:
    """Put the weights and usage counts of `parent` into a model whose config its own allowed (`TokenizerParent.inherit`).

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
