"""The released code's option names, and what is done with those that a caller passes.

An option that the weights show too must agree with them. A name that is nearly an option's is an error, since it would
otherwise be ignored without a word; other names are left alone, so that a file of notes and options can be passed whole.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from varcli.errors import ArtifactError, ConfigError
from varcli.scales import NAMED_SCHEDULES, PatchNums

TOKENIZER_OPTIONS = (
    "patch_nums",
    "vocab_size",
    "z_channels",
    "ch",
    "ch_mult",
    "num_res_blocks",
    "norm_groups",
    "dropout",
    "quant_conv_ks",
    "quant_resi",
    "share_quant_resi",
    "using_znorm",
    "beta",
    "in_channels",
    "image_size",
)
TRANSFORMER_OPTIONS = (
    "patch_nums",
    "vocab_size",
    "z_channels",
    "num_classes",
    "depth",
    "embed_dim",
    "num_heads",
    "mlp_ratio",
    "shared_aln",
    "attn_l2_norm",
    "norm_eps",
    "drop_path_rate",
    "drop_rate",
    "seq_len",
)
_OTHER_NAMES = {  # what varcli and the released constructors call some of them
    "v_patch_nums": "patch_nums",
    "channel_multipliers": "ch_mult",
    "cosine_codes": "using_znorm",
    "phi_residual": "quant_resi",
    "num_phis": "share_quant_resi",
    "commitment_weight": "beta",
    "code_channels": "z_channels",
    "quant_conv_kernel": "quant_conv_ks",
    "qk_norm": "attn_l2_norm",
    "shared_adaln": "shared_aln",
    "drop_path": "drop_path_rate",
}


class Options:
    """Options of one load: which were passed, and whether they agree with the weights in `where`."""

    def __init__(self, values: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
        for name in values:
            if name not in known:
                _refuse_near_miss(name, known)
        self.values = {name: values[name] for name in known if values.get(name) is not None}
        self.where = where

    def get(self, name: str, default: Any) -> Any:
        """Return an option that the weights do not show."""
        return self.values.get(name, default)

    def check(self, name: str, inferred: Any) -> Any:
        """Return what the weights show. Raises ArtifactError if the option was passed and says otherwise."""
        passed = self.values.get(name, inferred)
        if isinstance(passed, list):
            passed = tuple(passed)
        if passed != inferred:
            raise ArtifactError(
                f"`{self.where}` has {name} = {_show(inferred)}, but {_show(passed)} was asked for",
                f"leave {name} out to take what the weights show, or pass the file that belongs to it",
            )
        return inferred

    def patch_nums(self, num_scales: int | None, seq_len: int | None = None) -> tuple[int, ...] | None:
        """Return the sides passed, else those of the named schedule with this many scales and tokens, else None."""
        passed = self.values.get("patch_nums")
        if isinstance(passed, str):
            return PatchNums.parse(passed).sides
        if passed is not None:
            try:
                return PatchNums(tuple(passed)).sides
            except (TypeError, ValueError):
                raise ConfigError(f"patch_nums must be whole numbers, but is {passed!r}", "e.g. [1, 2, 3, 4]") from None
        for sides in NAMED_SCHEDULES.values():
            if num_scales in (None, len(sides)) and seq_len in (None, PatchNums(sides).seq_len):
                return sides
        return None


def _refuse_near_miss(name: str, known: tuple[str, ...]) -> None:
    if name in (*TOKENIZER_OPTIONS, *TRANSFORMER_OPTIONS):
        return  # of the other model: a file of notes may describe both
    meant = _OTHER_NAMES.get(name)
    near = [meant] if meant in known else difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.8)
    if near:
        raise ConfigError(f"unknown option `{name}`", f"it is called `{near[0]}` here")


def _show(value: Any) -> str:
    return ",".join(str(entry) for entry in value) if isinstance(value, tuple) else str(value)
