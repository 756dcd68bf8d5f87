"""The one way files are read: manifest first, every byte checked before it is used."""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from varcli import config as configs
from varcli.artifacts.manifest import FORMAT_VERSION, MANIFEST_NAME, PLAN_NAME, FileEntry, Manifest, hash_files
from varcli.artifacts.tensors import LENGTH, MAX_HEADER, parse_header, parse_tensors
from varcli.config import Config
from varcli.errors import ArtifactError, ConfigError, IntegrityError

_NAME = re.compile(r"[A-Za-z0-9._-]{1,128}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_MAX_JSON = 64 * 2**20  # bytes; the manifest of 100,000 shards stays below it


def read_json(path: Path) -> Any:
    """Read a JSON file of at most 64 MiB. Raises ArtifactError if it is missing, too large or not JSON."""
    try:
        if path.stat().st_size > _MAX_JSON:
            raise ArtifactError(f"`{path}` is larger than any JSON file of varcli")
        return json.loads(path.read_bytes())
    except OSError as error:
        raise ArtifactError(f"cannot read `{path}`: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"`{path}` is not valid JSON: {error}", "it was damaged or edited") from None


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Read a JSON-lines log of objects, dropping a torn last line. A missing file is an empty log."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue  # a crash can tear the line that was being appended
        if isinstance(record, dict):
            records.append(record)
    return records


_MAKERS = {
    "codes": "varcli tokenize IMAGES --out codes",
    "samples": "varcli sample",
    "tokenizer": "varcli train-tokenizer IMAGES",
    "transformer": "varcli train",
}
"""The command that makes each kind, for hints."""


def is_artifact(folder: Path) -> bool:
    """Say whether `folder` holds a manifest."""
    return (folder / MANIFEST_NAME).is_file()


def unfinished_kind(folder: Path) -> str | None:
    """Return the kind of what was begun in `folder` and not finished, "codes" or "samples"; None if nothing was.

    Only a plan of codes says how many pixels a code stands for.
    """
    path = folder / PLAN_NAME
    if is_artifact(folder) or not path.is_file():
        return None
    plan = read_json(path)
    return "codes" if isinstance(plan, dict) and "downsampling" in plan else "samples"


def read_plan(folder: Path, kind: str) -> dict[str, Any]:
    """Read what an unfinished folder of `kind` was begun with. Raises ArtifactError if it is another kind's, or damaged."""
    begun = unfinished_kind(folder)
    if begun != kind:
        raise ArtifactError(
            f"`{folder}` is an unfinished {begun} folder, but a {kind} folder is needed", "choose another folder"
        )
    plan = read_json(folder / PLAN_NAME)
    if not isinstance(plan, dict):
        raise ArtifactError(f"`{folder / PLAN_NAME}` is no plan of {kind}", "delete the folder to start anew")
    return plan


def read_manifest(folder: Path, kind: str | None = None) -> Manifest:
    """Read `folder/manifest.json`.

    kind: what it must be, or None for any. Raises ArtifactError if there is none, it is of another kind, or a newer
    varcli wrote it; IntegrityError if it names files outside its folder.
    """
    folder = Path(folder)
    path = folder / MANIFEST_NAME
    if not path.is_file():
        wanted = f"a finished {kind} folder" if kind else "a finished varcli folder"
        maker = _MAKERS.get(kind or "")
        if not folder.is_dir():
            what = "it is a file" if folder.exists() else "it does not exist"
            raise ArtifactError(f"`{folder}` is not {wanted}: {what}", maker and f"make it with `{maker}`")
        if kind and unfinished_kind(folder):
            read_plan(folder, kind)  # raises if it is of another kind
        again = f"`{maker}`" if maker else "the command that makes it"
        raise ArtifactError(f"`{folder}` is not {wanted}: it has no manifest.json", f"run {again} again, it resumes")
    value = read_json(path)
    try:
        manifest = Manifest(
            kind=str(value["kind"]),
            files={
                str(name): FileEntry(int(entry["size"]), str(entry["sha256"])) for name, entry in value["files"].items()
            },
            info=dict(value["info"]),
            made_by=dict(value.get("made_by", {})),
            format_version=int(value["format_version"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError):
        raise ArtifactError(f"`{path}` is not a varcli manifest", "pass a folder that varcli wrote") from None
    if manifest.format_version > FORMAT_VERSION:
        raise ArtifactError(
            f"`{folder}` was made by varcli {manifest.made_by.get('varcli', '?')} in format {manifest.format_version}; "
            f"this varcli reads up to format {FORMAT_VERSION}",
            "upgrade varcli",
        )
    for name, entry in manifest.files.items():
        if not _NAME.fullmatch(name) or name in (".", "..") or not _SHA256.fullmatch(entry.sha256):
            raise IntegrityError(f"`{path}` names a file that no varcli folder has: {name!r}")
        if not 0 <= entry.size < 2**62:
            raise IntegrityError(f"`{path}` says of `{name}` that it has {entry.size} bytes")
    if kind is not None and manifest.kind != kind:
        raise ArtifactError(f"`{folder}` is a {manifest.kind} folder, but a {kind} folder is needed")
    return manifest


def verify_folder(folder: Path, manifest: Manifest) -> list[str]:
    """Hash every file that `manifest` names; return one line a problem, an empty list if all is well."""
    problems = {}
    for name, entry in manifest.files.items():
        path = Path(folder) / name
        if not path.is_file() or path.is_symlink():
            problems[name] = "missing"
        elif path.stat().st_size != entry.size:
            problems[name] = f"{path.stat().st_size} bytes, manifest says {entry.size}"
    names = [name for name in manifest.files if name not in problems]
    for name, entry in zip(names, hash_files([Path(folder) / name for name in names]), strict=True):
        if entry != manifest.files[name]:
            problems[name] = "SHA-256 differs from the manifest"
    return [f"{name}: {problems[name]}" for name in manifest.files if name in problems]


def read_checked_bytes(folder: Path, name: str, manifest: Manifest) -> memoryview:
    """Read a file whole and check its size and SHA-256 on those same bytes. Raises IntegrityError if they differ."""
    entry = manifest.files.get(name)
    if entry is None:
        raise IntegrityError(f"`{folder}` has no entry for `{name}` in its manifest")
    data = _read_regular(Path(folder) / name, entry.size)
    if len(data) != entry.size or hashlib.sha256(data).hexdigest() != entry.sha256:
        raise IntegrityError(
            f"`{Path(folder) / name}` differs from its manifest: it was truncated, damaged or edited",
            "make it again, or restore it from a copy",
        )
    return data


def read_checked_tensors(folder: Path, name: str, manifest: Manifest) -> dict[str, Any]:
    """Read a safetensors file named by `manifest` as torch tensors on the CPU, checked before it is parsed."""
    return parse_tensors(read_checked_bytes(folder, name, manifest), Path(folder) / name)


def read_tensors(path: Path) -> dict[str, Any]:
    """Read a safetensors file that has no manifest (somebody else's). Raises ArtifactError if it is damaged."""
    path = Path(path)
    if not path.is_file():
        raise ArtifactError(f"`{path}` does not exist or is not a file")
    return parse_tensors(_read_regular(path, path.stat().st_size), path)


def read_tensor_header(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return dtype ("F32", "F16", ...) and shape of every tensor in a safetensors file, without reading the tensors.

    Raises ArtifactError if it is no safetensors file, or shorter than its header says.
    """
    path = Path(path).resolve()
    entries = parse_header(_read_regular(path, LENGTH.size + MAX_HEADER), path.stat().st_size, path)
    return {name: (entry.dtype, entry.shape) for name, entry in entries.items()}


def require_finite(tensors: Mapping[str, Any], where: str, hint: str = "the training that made it diverged") -> None:
    """Raise ArtifactError, with `hint`, naming the tensors that hold NaN or infinity. They may be on a GPU, asked once."""
    import torch

    def is_finite(tensor: torch.Tensor) -> torch.Tensor:
        # extremes, of which NaN becomes one, take a twentieth of isfinite's time; neither knows FP8
        return torch.stack(torch.aminmax(tensor if tensor.itemsize > 1 else tensor.float())).isfinite().all()

    floats = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point() and tensor.numel()}
    answers = torch.stack([is_finite(tensor) for tensor in floats.values()]).tolist() if floats else []
    bad = [name for name, answer in zip(floats, answers, strict=True) if not answer]
    if bad:
        shown = ", ".join(bad[:10]) + (f" and {len(bad) - 10} more" if len(bad) > 10 else "")
        raise ArtifactError(f"{where} holds NaN or infinity in: {shown}", hint)


def _read_regular(path: Path, size: int) -> memoryview:
    """Read up to `size` + 1 bytes of a regular file, without following a link, into memory that may be written to."""
    import numpy as np

    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0))
        with os.fdopen(descriptor, "rb", buffering=0) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise ArtifactError(f"`{path}` is not a regular file")
            # a bytearray would be filled with zeros first: a quarter of a second for a gigabyte
            data, done = memoryview(np.empty(min(size, status.st_size) + 1, dtype=np.uint8)), 0
            while count := file.readinto(data[done:]):
                done += count
            return data[:done]
    except OSError as error:
        if path.is_symlink():
            raise ArtifactError(
                f"`{path}` is a link, which is not followed",
                "put the file itself there: what a link leads to may change",
            ) from None
        raise ArtifactError(f"cannot read `{path}`: {error.strerror}") from None


def read_config(folder: Path, manifest: Manifest, cls: type[Config]) -> Config:
    """Return the config that the manifest of an artefact holds.

    Raises ArtifactError if it holds none, or one that cannot be.
    """
    hint = "it was edited, or written by a later varcli; restore it from a copy"
    values = manifest.info.get("config")
    if not isinstance(values, Mapping):
        raise ArtifactError(f"the manifest of `{folder}` has no config", hint)
    try:
        return configs.from_dict(cls, values)
    except ConfigError as error:
        raise ArtifactError(f"the manifest of `{folder}` has a config that cannot be: {error}", hint) from None
