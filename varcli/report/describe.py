"""What a path holds: any artefact of varcli, weights of others, or images; found out by content, without torch."""

from __future__ import annotations

import math
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from varcli.artifacts.foreign import check_archive, file_kind
from varcli.artifacts.manifest import Manifest
from varcli.artifacts.verify import (
    is_artifact,
    read_json,
    read_json_lines,
    read_manifest,
    read_tensor_header,
    unfinished_kind,
    verify_folder,
)
from varcli.data.decode import SUFFIXES, UnusableImage, load_image
from varcli.data.images import open_images
from varcli.errors import ArtifactError, DataError, IntegrityError
from varcli.progress import counted

Facts = dict[str, Any]

_MODEL_PARTS = ("tokenizer", "transformer")
_RUN_FILES = ("latest.json", "metrics.jsonl", "checkpoints")


@dataclass(frozen=True, kw_only=True)
class Description:
    """What one path holds."""

    path: Path
    kind: str  # "codes", "tokenizer", "model", "run", "images", "pickle", ...
    summary: str  # one sentence without the path
    facts: Facts = field(default_factory=dict)  # JSON values worth knowing, in the order to show them
    parts: tuple[Description, ...] = ()  # what lies inside: a model's tokenizer and transformer


def describe(path: Path, verify: bool = False) -> Description:
    """Say what `path` holds.

    verify: also hash every file and compare it with its manifest; else only sizes are compared.
    Raises ArtifactError if there is nothing or nothing known there, IntegrityError if files differ from the manifest.
    """
    path = Path(path)
    if path.is_dir():
        return _describe_folder(path, verify)
    if not path.exists():
        raise ArtifactError(f"`{path}` does not exist")
    if path.suffix == ".npz":
        return _describe_arrays(path)
    if path.suffix.lower() in SUFFIXES:
        return _describe_image(path)
    return _describe_pickle(path) if file_kind(path) == "pickle" else _describe_tensors(path)


def _describe_folder(folder: Path, verify: bool) -> Description:
    if is_artifact(folder):
        manifest = read_manifest(folder)
        _require_whole(folder, manifest, verify)
        return _describe_artifact(folder, manifest)
    parts = tuple(_describe_folder(folder / name, verify) for name in _MODEL_PARTS if is_artifact(folder / name))
    if any((folder / name).exists() for name in _RUN_FILES):
        return _describe_run(folder, parts)
    if parts:
        return _describe_model(folder, parts)
    begun = unfinished_kind(folder)
    if begun is not None:
        read_manifest(folder, begun)  # raises: it has none
    try:
        tree = open_images(folder, allow_single_class=True)
    except DataError as error:
        raise ArtifactError(
            f"`{folder}` is no artefact of varcli, for which it lacks manifest.json, nor a folder of images: {error}",
            error.hint or "an artefact may be unfinished: the command that makes it resumes when run again",
        ) from None
    counts = {name: len(split) for name, split in tree.splits.items()}
    return Description(
        path=folder,
        kind="images",
        summary=tree.summary,
        facts={"splits": counts, "classes": list(tree.classes), "skipped": len(tree.skipped)},
    )


def _require_whole(folder: Path, manifest: Manifest, verify: bool) -> None:
    if verify:
        problems = verify_folder(folder, manifest)
    else:
        problems = []
        for name, entry in manifest.files.items():
            path = folder / name
            size = path.stat().st_size if path.is_file() else None
            if size != entry.size:
                found = "missing" if size is None else f"{size} bytes, manifest says {entry.size}"
                problems.append(f"{name}: {found}")
    if problems:
        more = f" and {len(problems) - 1} more" if len(problems) > 1 else ""
        raise IntegrityError(
            f"`{folder}` is a {manifest.kind} folder, but not whole: {problems[0]}{more}",
            "make it again, or restore it from a copy",
        )


def _describe_artifact(folder: Path, manifest: Manifest) -> Description:
    describer = _BY_KIND.get(manifest.kind)
    try:
        summary, facts = describer(manifest.info) if describer else (f"a {manifest.kind} folder", dict(manifest.info))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise IntegrityError(f"the manifest of `{folder}` lacks or garbles {error}", "it was edited") from None
    facts |= _weights(folder, manifest)
    facts["made_by"] = manifest.made_by
    facts["bytes"] = sum(entry.size for entry in manifest.files.values())
    facts["files"] = len(manifest.files)
    return Description(path=folder, kind=manifest.kind, summary=summary, facts=facts)


def _tokenizer(info: Mapping[str, Any]) -> tuple[str, Facts]:
    config = info["config"]
    downsampling = 2 ** (len(config["channel_multipliers"]) - 1)
    side = config["patch_nums"][-1] * downsampling
    summary = f"a tokenizer for {side} px: {config['vocab_size']} codes of {config['code_channels']} channels"
    facts = {"fingerprint": info["fingerprint"], "patch_nums": config["patch_nums"], "downsampling": downsampling}
    return summary, facts | _rest(info)


def _transformer(info: Mapping[str, Any]) -> tuple[str, Facts]:
    config = info["config"]
    summary = (
        f"a transformer of depth {config['depth']} for {config['num_classes']} classes, "
        f"{sum(config['step_lengths'])} tokens in {len(config['step_lengths'])} steps"
    )
    return summary, dict(_rest(info))


def _codes(info: Mapping[str, Any]) -> tuple[str, Facts]:
    splits = {name: split["rows"] for name, split in info["splits"].items()}
    length = sum(side * side for side in info["patch_nums"])
    summary = f"a codes cache: {counted(sum(splits.values()), 'row')} of {length} codes, "
    summary += counted(len(info["classes"]), "class", "classes")
    facts = {"rows": splits, "tokenizer": info["tokenizer"], "patch_nums": info["patch_nums"]}
    facts |= {"image_size": info.get("image_size"), "views": info.get("views"), "skipped": len(info.get("skipped", []))}
    return summary, facts | {"classes": info["classes"]}


def _samples(info: Mapping[str, Any]) -> tuple[str, Facts]:
    facts = {name: value for name, value in info.items() if isinstance(value, (str, int, float, list, type(None)))}
    return "generated images", facts


def _checkpoint(info: Mapping[str, Any]) -> tuple[str, Facts]:
    return f"a training checkpoint at step {info['step']}", {"step": info["step"]}


_BY_KIND: dict[str, Callable[[Mapping[str, Any]], tuple[str, Facts]]] = {
    "tokenizer": _tokenizer,
    "transformer": _transformer,
    "codes": _codes,
    "samples": _samples,
    "checkpoint": _checkpoint,
}


def _rest(info: Mapping[str, Any]) -> Facts:
    """The entries of a model's manifest that are not shown otherwise, its config last."""
    shown = {name: value for name, value in info.items() if name not in ("config", "fingerprint", "patch_nums")}
    return shown | {"config": info["config"]}


def _weights(folder: Path, manifest: Manifest) -> Facts:
    """Count the weights of a model's folder."""
    if "weights.safetensors" not in manifest.files:
        return {}
    header = read_tensor_header(folder / "weights.safetensors")
    return {"parameters": count_weights(header), "stored_as": _dtypes(header)}


def count_weights(header: Mapping[str, tuple[str, tuple[int, ...]]]) -> int:
    """Count the weights of a model's file, by its header as `read_tensor_header` returns it."""
    return _count(
        {name: entry for name, entry in header.items() if not name.endswith("usage_KV")}
    )  # counts, no weights


def _describe_model(folder: Path, parts: tuple[Description, ...]) -> Description:
    facts: Facts = {}
    by_kind = {part.kind: part for part in parts}
    tokenizer, transformer = (by_kind.get(name) for name in _MODEL_PARTS)
    if tokenizer and transformer:
        facts["belong_together"] = transformer.facts.get("tokenizer") == tokenizer.facts["fingerprint"]
    what = " and ".join(name for name in _MODEL_PARTS if name in by_kind)
    return Description(path=folder, kind="model", summary=f"a model folder with {what}", facts=facts, parts=parts)


def _describe_run(folder: Path, parts: tuple[Description, ...]) -> Description:
    facts: Facts = {}
    if (folder / "latest.json").is_file():
        facts["latest_checkpoint"] = read_json(folder / "latest.json").get("checkpoint")
    records = read_json_lines(folder / "metrics.jsonl")
    if records:
        facts["last_metrics"] = records[-1]
    checkpoints = sorted(path.name for path in (folder / "checkpoints").glob("*") if is_artifact(path))
    facts["checkpoints"] = checkpoints
    if (folder / "config.json").is_file():
        facts["config"] = read_json(folder / "config.json")
    state = f"at {checkpoints[-1]}" if checkpoints else "without a checkpoint yet"
    return Description(path=folder, kind="run", summary=f"a training run {state}", facts=facts, parts=parts)


def _describe_tensors(path: Path) -> Description:
    header = read_tensor_header(path)
    facts = {"tensors": len(header), "elements": _count(header), "stored_as": _dtypes(header)}
    facts |= _released(header) | {"names": _shorten(header)}
    what = facts.get("content")
    summary = f"safetensors with {len(header)} tensors" + (f": {what}" if what else "")
    return Description(path=path, kind="safetensors", summary=summary, facts=facts)


def _describe_pickle(path: Path) -> Description:
    archive = check_archive(path)
    names = [name for name in archive.names if "." in name or name.startswith("pos_")]
    facts: Facts = {"bytes_of_tensors": archive.tensor_bytes, "members": archive.num_members}
    facts |= _released(archive.names) | {"asks_for": list(archive.globals), "names": _shorten(names)}
    what = facts.get("content")
    summary = "a .pth file, not unpickled" + (f": {what}; `varcli import` reads it" if what else "")
    return Description(path=path, kind="pickle", summary=summary, facts=facts)


def _describe_image(path: Path) -> Description:
    try:
        image, notes = load_image(path)
    except UnusableImage as error:
        raise ArtifactError(f"`{path}` is no image that varcli can use: {error}") from None
    facts = {"size": list(image.size), "converted": list(notes)}
    return Description(
        path=path, kind="image", summary=f"an image of {image.width} x {image.height} pixels", facts=facts
    )


def _describe_arrays(path: Path) -> Description:
    import numpy as np

    arrays = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                with archive.open(member) as file:
                    version = np.lib.format.read_magic(file)
                    read = (
                        np.lib.format.read_array_header_1_0
                        if version == (1, 0)
                        else np.lib.format.read_array_header_2_0
                    )
                    shape, _, dtype = read(file)
                arrays[member.filename.removesuffix(".npy")] = f"{dtype} {shape}"
    except (zipfile.BadZipFile, ValueError, EOFError, OSError, NotImplementedError) as error:
        raise ArtifactError(f"`{path}` is not a whole npz file: {error}", "make it again") from None
    listed = ", ".join(f"{name} {what}" for name, what in arrays.items())
    return Description(path=path, kind="arrays", summary=f"arrays: {listed}", facts={"arrays": arrays})


def _released(names: Iterable[str]) -> Facts:
    """Say what weights under the released VAR code's names are, judged by the names alone."""
    joined = "\n".join(names)
    found = []
    if "encoder.conv_in.weight" in joined:
        found.append("a VQVAE")
    blocks = [int(index) for index in re.findall(r"(?:^|\.)blocks\.(\d+)\.attn\.mat_qkv\.weight", joined, re.MULTILINE)]
    if blocks:
        found.append(f"a VAR transformer of depth {max(blocks) + 1}")
    return {"content": " and ".join(found)} if found else {}


def _count(header: Mapping[str, tuple[str, tuple[int, ...]]]) -> int:
    return sum(math.prod(shape) for _, shape in header.values())


def _dtypes(header: Mapping[str, tuple[str, tuple[int, ...]]]) -> list[str]:
    return [dtype for dtype, _ in Counter(dtype for dtype, _ in header.values()).most_common()]


def _shorten(names: Iterable[str], count: int = 8) -> list[str]:
    names = list(names)
    return names if len(names) <= count else [*names[:count], f"and {len(names) - count} more"]
