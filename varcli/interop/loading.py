"""Models from the released code's weights: every shape inferred, every tensor accounted for."""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from varcli import config as configs
from varcli.artifacts.verify import require_finite
from varcli.artifacts.weights import without_weights
from varcli.errors import ArtifactError, ConfigError
from varcli.interop.checkpoint import Checkpoint, State, read_checkpoint
from varcli.interop.names import quantizer_names, tokenizer_names, transformer_buffers, transformer_names
from varcli.interop.options import TOKENIZER_OPTIONS, TRANSFORMER_OPTIONS, Options
from varcli.scales import PatchNums
from varcli.tokenizer import VQVAE, TokenizerConfig
from varcli.tokenizer.quantizer import MultiScaleQuantizer
from varcli.transformer import Transformer, TransformerConfig

Source = str | os.PathLike[str] | Mapping[str, Any] | Checkpoint

_USAGE = "quantize.ema_vocab_hit_SV"
_LISTED = 10  # names an error shows of each kind


def load_tokenizer(source: Source, **config: Any) -> VQVAE:
    """Build a tokenizer from the released code's weights, float32, in inference mode.

    source: a `.pth` or safetensors file, or a state dict. config: options under the released code's names; what the
    weights do not show is patch_nums (default: the schedule for 256 px, or the only one of this many scales),
    using_znorm (False), quant_resi (0.5) and beta (0.25), and norm_groups (32). The others are inferred, and compared
    if passed; names that are no options are ignored.
    Raises ArtifactError if a tensor is missing, left over or of another shape, or an option contradicts the weights;
    ConfigError if an option is misspelt; UnsafeFileError for a file that could run code.
    """
    found = _read(source)
    state = _pick(found, "tokenizer")
    options = Options(config, TOKENIZER_OPTIONS, found.where)
    width = _size(state, "encoder.conv_in.weight", 0, found.where)
    settings = _quantizer_settings(state, options, found)
    settings |= {
        "width": options.check("ch", width),
        "channel_multipliers": options.check("ch_mult", _multipliers(state, width, found.where)),
        "num_res_blocks": options.check("num_res_blocks", _count(state, r"encoder\.down\.0\.block\.(\d+)\.")),
        "quant_conv_kernel": options.check("quant_conv_ks", _size(state, "quant_conv.weight", 3, found.where)),
        "norm_groups": options.get("norm_groups", 32),
        "dropout": options.get("dropout", 0.0),
    }
    tokenizer_config = configs.from_dict(TokenizerConfig, settings)
    options.check("in_channels", 3)
    options.check("image_size", tokenizer_config.image_size)
    with without_weights():
        tokenizer = VQVAE(tokenizer_config)
    names = tokenizer_names(tokenizer.state_dict(), tokenizer_config.num_phis)
    return _fill(tokenizer, names, _with_usage(state, tokenizer_config), {}, found.where)


def load_quantizer(source: Source, **config: Any) -> MultiScaleQuantizer:
    """Build a quantizer alone from the `quantize.*` tensors of the released code, which may be those of a whole VQVAE.

    Options and errors are those of `load_tokenizer`.
    """
    found = _read(source)
    state = found.quantizer
    if found.tokenizer is not None:
        state = {name: tensor for name, tensor in found.tokenizer.items() if name.startswith("quantize.")}
    if state is None:
        raise ArtifactError(f"`{found.where}` holds {found.content}, but a quantizer is needed")
    options = Options(config, TOKENIZER_OPTIONS, found.where)
    quantizer_config = configs.from_dict(TokenizerConfig, _quantizer_settings(state, options, found))
    with without_weights():
        quantizer = MultiScaleQuantizer(quantizer_config)
    names = quantizer_names(quantizer.state_dict(), quantizer_config.num_phis)
    return _fill(quantizer, names, _with_usage(state, quantizer_config), {}, found.where)


def load_transformer(source: Source, **config: Any) -> Transformer:
    """Build a transformer from the released code's weights, float32, in inference mode.

    source: a `.pth` or safetensors file, or a state dict. config: options under the released code's names; what the
    weights do not show is norm_eps (1e-6), patch_nums if they are of no named schedule and the file lacks `lvl_1L`, and
    num_heads (width / 64) if attn_l2_norm is off. The others are inferred, and compared if passed; names that are no
    options are ignored. Errors are those of `load_tokenizer`.
    """
    found = _read(source)
    state = _pick(found, "transformer")
    where = found.where
    options = Options(config, TRANSFORMER_OPTIONS, where)
    width = _size(state, "class_emb.weight", 1, where)
    hidden = _size(state, "blocks.0.ffn.fc1.weight", 0, where)
    mlp_ratio = options.get("mlp_ratio", hidden / width)
    if round(width * mlp_ratio) != hidden:
        options.check("mlp_ratio", hidden / width)
    has_norm = "blocks.0.attn.scale_mul_1H11" in state
    num_heads = options.get("num_heads", max(width // 64, 1))
    if has_norm:
        num_heads = options.check("num_heads", _size(state, "blocks.0.attn.scale_mul_1H11", 1, where))
    sides = _transformer_sides(state, options, found)
    settings = {
        "step_lengths": PatchNums(sides).step_lengths,
        "vocab_size": options.check("vocab_size", _size(state, "head.weight", 0, where)),
        "code_channels": options.check("z_channels", _size(state, "word_embed.weight", 1, where)),
        "num_classes": options.check("num_classes", _size(state, "class_emb.weight", 0, where) - 1),
        "depth": options.check("depth", _count(state, r"blocks\.(\d+)\.")),
        "width": options.check("embed_dim", width),
        "num_heads": num_heads,
        "mlp_ratio": mlp_ratio,
        "shared_adaln": options.check("shared_aln", "shared_ada_lin.1.weight" in state),
        "qk_norm": options.check("attn_l2_norm", has_norm),
        "norm_eps": options.get("norm_eps", 1e-6),
        "drop_path": options.get("drop_path_rate", 0.0),
        "dropout": options.get("drop_rate", 0.0),
    }
    transformer_config = configs.from_dict(TransformerConfig, settings)
    options.check("seq_len", transformer_config.seq_len)
    with without_weights():
        transformer = Transformer(transformer_config)
    buffers = transformer_buffers(transformer_config)
    return _fill(transformer, transformer_names(transformer.state_dict()), state, buffers, where)


def _read(source: Source) -> Checkpoint:
    return source if isinstance(source, Checkpoint) else read_checkpoint(source)


def _pick(found: Checkpoint, kind: str) -> State:
    state = getattr(found, kind)
    if state is None:
        name = "a VQVAE" if kind == "tokenizer" else "a VAR transformer"
        raise ArtifactError(
            f"`{found.where}` holds {found.content}, but {name} is needed", "pass the other file, or swap the two"
        )
    return state


def _quantizer_settings(state: State, options: Options, found: Checkpoint) -> dict[str, Any]:
    """Return the fields of TokenizerConfig that the quantizer decides."""
    convs = _count(state, r"quantize\.quant_resi\.qresi_ls\.(\d+)\.")
    own_convs = _count(state, r"quantize\.quant_resi\.(\d+)\.")
    has_phis = bool(convs or own_convs) or "quantize.quant_resi.qresi.weight" in state
    residual = options.get("quant_resi", 0.5 if has_phis else 0.0)
    num_phis = options.get("share_quant_resi", 4)
    if has_phis:
        num_phis = options.check("share_quant_resi", convs or (0 if own_convs else 1))
    if isinstance(residual, (int, float)) and (abs(residual) > 1e-6) != has_phis:
        has = "has phi convolutions" if has_phis else "has no phi convolutions"
        raise ArtifactError(f"`{found.where}` {has}, but quant_resi = {residual} was asked for", "leave quant_resi out")
    num_scales = own_convs or (state[_USAGE].shape[0] if _USAGE in state and state[_USAGE].ndim == 2 else None)
    sides = options.patch_nums(num_scales) if "patch_nums" in options.values else found.patch_nums
    sides = sides or options.patch_nums(num_scales)
    if sides is None:
        raise ConfigError(
            f"`{found.where}` has {num_scales} scales, which no named schedule has", "pass their sides: patch_nums"
        )
    if own_convs and len(sides) != own_convs:
        raise ArtifactError(f"`{found.where}` has {own_convs} scales, but patch_nums {sides} has {len(sides)}")
    return {
        "patch_nums": sides,
        "vocab_size": options.check("vocab_size", _size(state, "quantize.embedding.weight", 0, found.where)),
        "code_channels": options.check("z_channels", _size(state, "quantize.embedding.weight", 1, found.where)),
        "phi_residual": residual,
        "num_phis": num_phis,
        "cosine_codes": options.get("using_znorm", False),
        "commitment_weight": options.get("beta", 0.25),
    }


def _with_usage(state: State, config: TokenizerConfig) -> dict[str, Tensor]:
    """Give a state the counts of its codes' use that fit the config: zeros if it has none, or for other scales."""
    state = dict(state)
    usage = state.get(_USAGE)
    if usage is None or (usage.ndim == 2 and usage.shape[0] != len(config.patch_nums)):
        state[_USAGE] = torch.zeros(len(config.patch_nums), config.vocab_size)
    return state


def _transformer_sides(state: State, options: Options, found: Checkpoint) -> tuple[int, ...]:
    """Return patch_nums: passed, else read off the file's token levels, else noted by the trainer, else by name."""
    seq_len = _size(state, "pos_1LC", 1, found.where)
    num_scales = _size(state, "lvl_embed.weight", 0, found.where)
    sides = options.patch_nums(num_scales, seq_len) if "patch_nums" in options.values else None
    if sides is None and "lvl_1L" in state:
        lengths = Counter(state["lvl_1L"].flatten().tolist())
        sides = tuple(math.isqrt(lengths[step]) for step in range(num_scales) if lengths[step])
    sides = sides or found.patch_nums or options.patch_nums(num_scales, seq_len)
    if sides is None:
        raise ConfigError(
            f"`{found.where}` has {seq_len} tokens in {num_scales} scales, which no named schedule has",
            "pass their sides: patch_nums",
        )
    if (len(sides), sum(side * side for side in sides)) != (num_scales, seq_len):
        raise ArtifactError(
            f"`{found.where}` has {seq_len} tokens in {num_scales} scales, but patch_nums {','.join(map(str, sides))} has "
            f"{sum(side * side for side in sides)} in {len(sides)}",
            "leave patch_nums out, or pass the file that belongs to it",
        )
    return sides


def _multipliers(state: State, width: int, where: str) -> tuple[int, ...]:
    """Return the channels of each level over those of the first convolution."""
    num_levels = max(_count(state, r"encoder\.down\.(\d+)\."), 1)
    widths = [_size(state, f"encoder.down.{level}.block.0.conv1.weight", 0, where) for level in range(num_levels)]
    if not width or any(level % width for level in widths):
        raise ArtifactError(f"`{where}`: its levels have {widths} channels, which are not multiples of {width}")
    return tuple(level // width for level in widths)


def _size(state: State, name: str, dimension: int, where: str) -> int:
    if name not in state:
        raise ArtifactError(f"`{where}` lacks the weight `{name}`", "it is another model, or only a part of one")
    if dimension >= state[name].ndim:
        raise ArtifactError(f"`{where}`: weight `{name}` has shape {tuple(state[name].shape)}")
    return state[name].shape[dimension]


def _count(state: State, pattern: str) -> int:
    """Return one more than the largest index that `pattern` finds in the names, 0 if it finds none."""
    found = [int(match[1]) for name in state if (match := re.match(pattern, name))]
    return max(found, default=-1) + 1


def _fill(module: nn.Module, names: Mapping[str, str], state: State, buffers: State, where: str) -> Any:
    """Put weights into a module that was made on the meta device.

    names: ours to theirs. buffers: what may be in `state` besides, with the values it must have.
    """
    expected = module.state_dict()
    problems = {
        "missing": [theirs for theirs in names.values() if theirs not in state],
        "of another shape": [
            f"{theirs} {tuple(state[theirs].shape)} instead of {tuple(expected[ours].shape)}"
            for ours, theirs in names.items()
            if theirs in state and state[theirs].shape != expected[ours].shape
        ],
        "without a place": [name for name in state if name not in {*names.values(), *buffers}],
        "not floats": [name for name in names.values() if name in state and not state[name].is_floating_point()],
        "not what it is computed from": [
            name for name, value in buffers.items() if name in state and not torch.equal(state[name].to(value), value)
        ],
    }
    if any(problems.values()):
        parts = [f"{len(found)} {kind}: {_shorten(found)}" for kind, found in problems.items() if found]
        raise ArtifactError(f"`{where}` does not fit; of its tensors are {'; '.join(parts)}", _hint(problems))
    ours = {name: state[theirs].detach().to(torch.float32, copy=True).contiguous() for name, theirs in names.items()}
    require_finite({names[name]: tensor for name, tensor in ours.items()}, f"`{where}`")
    module.load_state_dict(ours, assign=True)
    return module.eval()


def _shorten(names: list[str]) -> str:
    return ", ".join(names[:_LISTED]) + (f" and {len(names) - _LISTED} more" if len(names) > _LISTED else "")


def _hint(problems: Mapping[str, list[str]]) -> str:
    if problems["of another shape"] and not problems["missing"] and not problems["without a place"]:
        return "the tensors are of models of different sizes, or an option such as patch_nums says otherwise"
    if problems["missing"] and not problems["without a place"]:
        return "the file is only a part of a model"
    return "it may be of another version of the model, or two models in one file"
