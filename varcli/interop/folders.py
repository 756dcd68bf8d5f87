"""Between the released code's files and varcli's model folders, both directions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from varcli.artifacts.lock import hold_folder
from varcli.artifacts.manifest import MANIFEST_NAME, hash_file, write_manifest
from varcli.artifacts.verify import is_artifact, read_manifest
from varcli.artifacts.write import write_json, write_tensors
from varcli.errors import ArtifactError, unknown_name
from varcli.interop.checkpoint import Checkpoint, read_checkpoint
from varcli.interop.loading import load_tokenizer, load_transformer
from varcli.interop.names import tokenizer_names, transformer_buffers, transformer_names
from varcli.interop.options import TOKENIZER_OPTIONS, TRANSFORMER_OPTIONS
from varcli.progress import OnStep, Step, ignore
from varcli.tokenizer import TokenizerConfig
from varcli.tokenizer import store as tokenizers
from varcli.transformer import TransformerConfig
from varcli.transformer import store as transformers

KIND = "released weights"
_REFERENCE_GROUPS = 32


@dataclass(frozen=True, kw_only=True)
class ImportResult:
    """What an import wrote."""

    folder: Path  # the model folder
    fingerprint: str  # of the tokenizer
    tokenizer: TokenizerConfig
    transformer: TransformerConfig | None  # None if there was only a tokenizer
    num_parameters: dict[str, int]  # by part


@dataclass(frozen=True, kw_only=True)
class ExportResult:
    """What an export wrote."""

    folder: Path
    files: tuple[str, ...]  # names in it
    notes: tuple[str, ...]  # what the released code does not know about these weights


def import_official(
    paths: Sequence[Path], out: Path, options: Mapping[str, Any] | None = None, on_step: OnStep = ignore
) -> ImportResult:
    """Write the model folder `out` from the released code's files: `out/tokenizer/` and `out/transformer/`.

    paths: a VQVAE and a VAR transformer, or one trainer checkpoint that holds both; a VQVAE alone makes a folder that
    can tokenize. options: as `load_tokenizer` and `load_transformer` take them.
    Raises their errors; ArtifactError if a part is missing or twice, if the two do not belong together, or if `out` holds
    another model; ConfigError for an unknown option.
    """
    options = dict(options or {})
    exported = _exported(paths)
    for name in options:
        if name not in (*TOKENIZER_OPTIONS, *TRANSFORMER_OPTIONS):
            raise unknown_name("option", name, {*TOKENIZER_OPTIONS, *TRANSFORMER_OPTIONS})
    found = []
    for path in paths:
        on_step(Step(len(found), len(paths) + 2, "parts", message=f"reading {path}"))
        found.append(read_checkpoint(path))
    tokenizer_from, transformer_from = _one(found, "tokenizer"), _one(found, "transformer")
    if tokenizer_from is None:
        raise ArtifactError(
            f"there is no VQVAE in {', '.join(f'`{entry.where}`' for entry in found)}",
            "pass its file too, e.g. vae_ch160v4096z32.pth: codes mean nothing without it",
        )
    transformer = None
    shared = {name: value for name, value in options.items() if name in TOKENIZER_OPTIONS}
    if transformer_from is not None:
        own = {name: value for name, value in options.items() if name in TRANSFORMER_OPTIONS}
        transformer = load_transformer(transformer_from, **{**exported.get("transformer", {}), **own})
        shared["patch_nums"] = sides_of(transformer.config.step_lengths)
    tokenizer = load_tokenizer(tokenizer_from, **{**exported.get("tokenizer", {}), **shared})
    if transformer is not None:
        require_pair(tokenizer.config, transformer.config, tokenizer_from.where, transformer_from.where)
    out = Path(out)
    with hold_folder(out, {tokenizers.KIND, transformers.KIND}, "model"):
        source = _source(paths, tokenizer_from)
        _refuse_other(out / tokenizers.KIND, source)
        on_step(Step(len(paths), len(paths) + 2, "parts", message=f"writing {out / tokenizers.KIND}"))
        manifest = tokenizers.save_tokenizer(out / tokenizers.KIND, tokenizer, {"source": source})
        fingerprint = manifest.info["fingerprint"]
        if transformer is not None:
            source = _source(paths, transformer_from)
            _refuse_other(out / transformers.KIND, source)
            on_step(Step(len(paths) + 1, len(paths) + 2, "parts", message=f"writing {out / transformers.KIND}"))
            info = {
                "tokenizer": fingerprint,
                "patch_nums": list(tokenizer.config.patch_nums),
                "order": "scale",
                "source": source,
                **({"classes": exported["classes"]} if exported.get("classes") else {}),
            }
            transformers.save_transformer(out / transformers.KIND, transformer, info)
    on_step(Step(len(paths) + 2, len(paths) + 2, "parts"))
    models = {"tokenizer": tokenizer, "transformer": transformer}
    return ImportResult(
        folder=out,
        fingerprint=fingerprint,
        tokenizer=tokenizer.config,
        transformer=transformer.config if transformer is not None else None,
        num_parameters={
            name: sum(parameter.numel() for parameter in model.parameters())
            for name, model in models.items()
            if model is not None
        },
    )


def export_official(model_folder: Path, out: Path) -> ExportResult:
    """Write a model folder's parts under the released code's names, as safetensors, with their options beside them.

    The tensors are exactly those that the released code's `load_state_dict(strict=True)` wants, computed ones included.
    A `.pth` file is never written: it is a program as much as a file of numbers, and one line of torch turns safetensors
    into it. Raises ArtifactError if the folder holds no whole model, or `out` cannot be written.
    """
    model_folder = Path(model_folder)
    parts = [name for name in (tokenizers.KIND, transformers.KIND) if is_artifact(model_folder / name)]
    if not parts:
        if not model_folder.exists():
            raise ArtifactError(
                f"there is no model `{model_folder}`", "pass a folder that `varcli train` or `varcli import` wrote"
            )
        raise ArtifactError(
            f"`{model_folder}` is not a model folder: it holds neither tokenizer/ nor transformer/",
            "pass a folder that `varcli train` or `varcli import` wrote",
        )
    out, classes = Path(out), None
    files: dict[str, dict[str, Tensor]] = {}
    options: dict[str, Any] = {}
    notes = []
    if tokenizers.KIND in parts:
        tokenizer = tokenizers.load_tokenizer(model_folder / tokenizers.KIND)
        config = tokenizer.config
        files[f"vae_ch{config.width}v{config.vocab_size}z{config.code_channels}.safetensors"] = _renamed(
            tokenizer, tokenizer_names(tokenizer.state_dict(), config.num_phis)
        )
        options["tokenizer"] = tokenizer_options(config)
        if config.norm_groups != _REFERENCE_GROUPS:
            notes.append(
                f"the tokenizer norms {config.norm_groups} groups, and the released code always {_REFERENCE_GROUPS}: "
                "it would compute something else from these weights"
            )
    if transformers.KIND in parts:
        transformer, manifest = transformers.load_transformer(model_folder / transformers.KIND)
        if manifest.info.get("order", "scale") != "scale":
            raise ArtifactError(
                f"`{model_folder}` predicts in the order `{manifest.info['order']}`, which the released code lacks"
            )
        classes = manifest.info.get("classes")
        files[f"var_d{transformer.config.depth}.safetensors"] = _renamed(
            transformer, transformer_names(transformer.state_dict())
        ) | transformer_buffers(transformer.config)
        options["transformer"] = transformer_options(transformer.config)
        if transformer.config.head_width != 64:
            notes.append(
                f"attention heads are {transformer.config.head_width} wide, and the released builder's always 64: "
                "its VAR class takes num_heads"
            )
    with hold_folder(out, {MANIFEST_NAME}, "exported weights"):
        if is_artifact(out):
            read_manifest(out, KIND)  # not another kind of folder
        for name, tensors in files.items():
            write_tensors(out / name, tensors, {"format": "pt"})
        write_json(out / "config.json", options)
        write_manifest(
            out, KIND, {"options": options, "notes": notes, "classes": classes}, files=[*files, "config.json"]
        )
    return ExportResult(folder=out, files=(*files, "config.json"), notes=tuple(notes))


def tokenizer_options(config: TokenizerConfig) -> dict[str, Any]:
    """Return a tokenizer's settings under the released code's names, as `load_tokenizer` takes them."""
    return {
        "patch_nums": list(config.patch_nums),
        "vocab_size": config.vocab_size,
        "z_channels": config.code_channels,
        "ch": config.width,
        "ch_mult": list(config.channel_multipliers),
        "num_res_blocks": config.num_res_blocks,
        "norm_groups": config.norm_groups,
        "dropout": config.dropout,
        "quant_conv_ks": config.quant_conv_kernel,
        "quant_resi": config.phi_residual,
        "share_quant_resi": config.num_phis,
        "using_znorm": config.cosine_codes,
        "beta": config.commitment_weight,
    }


def transformer_options(config: TransformerConfig) -> dict[str, Any]:
    """Return a transformer's settings under the released code's names, as `load_transformer` takes them."""
    return {
        "patch_nums": list(sides_of(config.step_lengths)),
        "vocab_size": config.vocab_size,
        "z_channels": config.code_channels,
        "num_classes": config.num_classes,
        "depth": config.depth,
        "embed_dim": config.width,
        "num_heads": config.num_heads,
        "mlp_ratio": config.mlp_ratio,
        "shared_aln": config.shared_adaln,
        "attn_l2_norm": config.qk_norm,
        "norm_eps": config.norm_eps,
        "drop_path_rate": config.drop_path,
        "drop_rate": config.dropout,
    }


def sides_of(step_lengths: Sequence[int]) -> tuple[int, ...]:
    """Return the sides of square token maps of these lengths."""
    return tuple(round(length**0.5) for length in step_lengths)


def require_pair(
    tokenizer: TokenizerConfig, transformer: TransformerConfig, tokenizer_from: str, transformer_from: str
) -> None:
    """Raise ArtifactError unless a transformer predicts this tokenizer's codes, as far as sizes tell."""
    pairs = {
        "codes": (tokenizer.vocab_size, transformer.vocab_size),
        "code channels": (tokenizer.code_channels, transformer.code_channels),
        "tokens": (tokenizer.scales.seq_len, transformer.seq_len),
    }
    for what, (have, want) in pairs.items():
        if have != want:
            raise ArtifactError(
                f"`{tokenizer_from}` has {have} {what}, but `{transformer_from}` was trained for {want}",
                "pass the VQVAE that the transformer was trained with",
            )


def _one(found: Sequence[Checkpoint], kind: str) -> Checkpoint | None:
    holders = [entry for entry in found if getattr(entry, kind) is not None]
    if len(holders) > 1:
        raise ArtifactError(
            f"`{holders[0].where}` and `{holders[1].where}` both hold a {kind}", "a model folder holds one of each"
        )
    return holders[0] if holders else None


def _exported(paths: Sequence[Path]) -> dict[str, Any]:
    """Return the options and classes that `export_official` left beside the files, empty for files from elsewhere."""
    for folder in {Path(path).parent for path in paths}:
        if is_artifact(folder) and (manifest := read_manifest(folder)).kind == KIND:
            return {**manifest.info["options"], "classes": manifest.info.get("classes")}
    return {}


def _source(paths: Sequence[Path], found: Checkpoint) -> dict[str, Any]:
    path = next(Path(path) for path in paths if str(path) == found.where)
    return {"file": path.name, "sha256": hash_file(path).sha256, "layout": found.layout}


def _refuse_other(folder: Path, source: Mapping[str, Any]) -> None:
    if is_artifact(folder) and read_manifest(folder).info.get("source", {}).get("sha256") != source["sha256"]:
        raise ArtifactError(f"`{folder}` exists and was not made from `{source['file']}`", "choose another --out")


def _renamed(model: nn.Module, names: Mapping[str, str]) -> dict[str, Tensor]:
    return {names[name]: tensor for name, tensor in model.state_dict().items()}
