"""Checkpoints of a run: folders that appear whole, the last few kept, the newest found, a damaged one named.

    checkpoints/step-0000100/   one safetensors file a part, manifest.json last (kind "checkpoint"); of a run whose state is
                                sharded, a part's pieces in files of their own, part-00001-of-00008.safetensors
    latest.json                 {"checkpoint": "step-0000100"}, beside checkpoints/, for people and scripts

A folder is written under a temporary name and renamed, so that one called step-... was whole once; if its bytes differ
from the manifest now, something damaged it. Each process writes and reads its own piece (`varcli.distributed.checkpoint`),
and any number of processes, with shards or without, go on from what any other number wrote.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from varcli.artifacts.manifest import Manifest, write_manifest
from varcli.artifacts.verify import read_checked_tensors, read_manifest, verify_folder
from varcli.artifacts.write import TEMPORARY_PREFIX, atomic_folder, prepare_folder, write_json, write_tensors
from varcli.distributed import ALONE, World
from varcli.distributed.checkpoint import Joiner, Piece, cut
from varcli.distributed.parallelize import is_shard
from varcli.errors import ArtifactError, IntegrityError, ShapeError, unknown_name
from varcli.training.state import Parts

KIND = "checkpoint"
FOLDER_NAME = "checkpoints"
LATEST_NAME = "latest.json"
RESUME_MODES = ("auto", "last-good", "never")
_PATIENCE = 60.0  # seconds until what one host has written must be seen by the others
_STEP = re.compile(r"step-(\d{7,})")
_PART = re.compile(r"(.+?)(-\d{5,}-of-(\d{5,}))?\.safetensors")


def checkpoint_name(step: int) -> str:
    """Name of the checkpoint after `step` optimizer steps."""
    return f"step-{step:07d}"


def save_checkpoint(
    run: Path, step: int, parts: Parts, info: Mapping[str, Any], keep: int = 2, world: World = ALONE
) -> Manifest | None:
    """Write the checkpoint after `step` optimizer steps into a run folder, point latest.json at it, drop old ones.

    info: JSON values for the manifest, beside "step". keep: how many of the newest stay, at least 1. world: its processes
    all call this; those that hold a shard that no other one writes write it, the first one does the rest. Returns the
    manifest, None in other processes than the first.
    Raises ArtifactError if the disk is full or not writable; earlier checkpoints are then as they were.
    """
    files = parts.tensors()
    pieces = {name: cut(tensors, world) for name, tensors in files.items()}
    is_shared = any(is_shard(tensor) for tensors in files.values() for tensor in tensors.values())
    if not world.is_first:
        if is_shared:
            _write_pieces(Path(world.say("")), pieces)
            world.wait()
        return None
    size = sum(tensor.nbytes for tensors in files.values() for tensor in tensors.values())
    folder = prepare_folder(run / FOLDER_NAME, need_bytes=size) / checkpoint_name(step)
    with atomic_folder(folder) as temporary:
        if is_shared:
            world.say(str(temporary))
        _write_pieces(temporary, pieces)
        if is_shared:
            world.wait()
        names = [_file_name(name, index, own.count) for name, own in pieces.items() for index in range(own.count)]
        # hashing reads everything back, so that old checkpoints go only once this one can be read
        manifest = write_manifest(temporary, KIND, {**info, "step": step}, files=names)
    write_json(run / LATEST_NAME, {"checkpoint": folder.name})
    for old in list_checkpoints(run)[keep:]:
        # a kill in the middle leaves nothing half under its name
        doomed = old.with_name(f"{TEMPORARY_PREFIX}{old.name}")
        os.replace(old, doomed)
        shutil.rmtree(doomed, ignore_errors=True)
    return manifest


def amend_checkpoint(run: Path, step: int, changes: Mapping[str, Any]) -> Manifest:
    """Change what the manifest of the checkpoint after `step` steps says beside its files; return the new one.

    changes: JSON values that replace those of the same names. Raises ArtifactError if there is no such checkpoint, or the
    disk is full; the manifest is then as it was.
    """
    folder = run / FOLDER_NAME / checkpoint_name(step)
    manifest = read_manifest(folder, KIND)
    return write_manifest(folder, KIND, {**manifest.info, **changes}, known=manifest.files)


def _write_pieces(folder: Path, pieces: Mapping[str, Piece | None]) -> None:
    for name, piece in pieces.items():
        if piece is not None:
            write_tensors(folder / _file_name(name, piece.index, piece.count), piece.tensors)


def _file_name(part: str, index: int, count: int) -> str:
    return f"{part}.safetensors" if count == 1 else f"{part}-{index + 1:05d}-of-{count:05d}.safetensors"


def list_checkpoints(run: Path) -> list[Path]:
    """Checkpoint folders of a run, newest first, damaged ones included."""
    folder = run / FOLDER_NAME
    found = [path for path in folder.iterdir() if _STEP.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")), reverse=True)


def find_checkpoint(run: Path, resume: str = "auto") -> tuple[Path, Manifest] | None:
    """Return the checkpoint to go on from and its manifest, or None if a run has none yet.

    resume: "auto" takes the newest; "last-good" the newest that is whole, and sets damaged ones after it aside under
    another name. Raises IntegrityError, naming the newest whole one, if the newest is damaged and resume is "auto", and
    if there was one once, but none is left.
    """
    if resume not in RESUME_MODES:
        raise unknown_name("resume mode", resume, RESUME_MODES)
    folders = list_checkpoints(run)
    if not folders and (run / LATEST_NAME).is_file():
        raise IntegrityError(
            f"`{run}` has trained, as its {LATEST_NAME} says, but its {FOLDER_NAME}/ are gone",
            f"restore them from a copy, or choose another --out; to train it anew, delete {LATEST_NAME} first",
        )
    damaged: list[tuple[Path, str]] = []
    for folder in folders:
        manifest, problem = _check(folder)
        if manifest is not None:
            break
        damaged.append((folder, problem))
    else:
        folder, manifest = None, None
    if damaged and resume != "last-good":
        first, problem = damaged[0]
        raise IntegrityError(
            f"checkpoint `{first}` is damaged: {problem}",
            f"go back to `{folder.name}`, the newest whole one, with --resume last-good"
            if folder
            else "no checkpoint of this run is whole: restore one from a copy, or choose another --out",
        )
    if damaged and folder is None:
        raise IntegrityError(
            f"no checkpoint of `{run}` is whole: {damaged[0][0].name} {damaged[0][1]}",
            "restore one from a copy, or choose another --out to start anew",
        )
    for path, _ in damaged:
        os.replace(path, path.with_name(f"damaged-{path.name}"))
    return (folder, manifest) if folder else None


def await_checkpoint(folder: Path, digest: str, seconds: float = _PATIENCE) -> tuple[Path, Manifest]:
    """Return a checkpoint that another process of the job has found whole, as soon as this one sees all its files.

    digest: of its manifest. Folders that hosts share may show others what is there, or what was there before, for a while.
    Files are known by their sizes; nothing is hashed. Raises ArtifactError after `seconds`, with what was still missing.
    """
    until = time.monotonic() + seconds
    while True:
        try:
            manifest = read_manifest(folder, KIND)
            missing = [name for name, entry in manifest.files.items() if _size(folder / name) != entry.size]
            if manifest.digest == digest and not missing:
                return folder, manifest
            problem = f"not whole are {', '.join(missing)}" if missing else "what is there is another checkpoint"
        except ArtifactError as error:
            problem = str(error)
        if time.monotonic() >= until:
            raise ArtifactError(
                f"the first process goes on from `{folder}`, but this one does not see it: {problem}",
                "all processes need the run folder: put it on a file system that the hosts share",
            )
        time.sleep(0.2)


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:  # not there, or a stale handle of a shared file system
        return None


def load_checkpoint(folder: Path, manifest: Manifest, parts: Parts) -> None:
    """Put a checkpoint's tensors into a trainer's parts, every byte checked against the manifest first.

    A part in pieces is read piece by piece, by a process with shards only those that hold some of its rows.
    Raises IntegrityError for changed bytes, ArtifactError if it was made by another model.
    """
    counts = {match[1]: int(match[3] or 1) for match in map(_PART.fullmatch, manifest.files) if match}
    parts.load({part: _read_part(folder, manifest, parts, part, count) for part, count in counts.items()}, folder)


def _read_part(folder: Path, manifest: Manifest, parts: Parts, part: str, count: int) -> dict[str, Tensor]:
    joiner = Joiner(partial(parts.layout, part), count)
    for index in range(count):
        if joiner.needs(index):
            for key, tensor in read_checked_tensors(folder, _file_name(part, index, count), manifest).items():
                try:
                    joiner.add(index, key, tensor)
                except ShapeError as error:
                    raise ArtifactError(f"`{folder}` was made by another model: {error}") from None
    return joiner.join()


def _check(folder: Path) -> tuple[Manifest | None, str]:
    """Return the manifest if the folder is whole, else None and what is wrong."""
    try:
        manifest = read_manifest(folder, KIND)
    except ArtifactError as error:
        return None, str(error)
    problems = verify_folder(folder, manifest)
    return (None, "; ".join(problems)) if problems else (manifest, "")
