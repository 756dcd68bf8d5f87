"""emoji64, the images that come with varcli: drawings by three artists in ten classes (licences in its NOTICE.md)."""

from __future__ import annotations

import os
import re
import shutil
import zipfile
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path

from varcli.artifacts.lock import hold_folder
from varcli.artifacts.write import prepare_folder, write_bytes
from varcli.data.paths import escape_path
from varcli.errors import ArtifactError

EMOJI64_CLASSES = (
    *("Activities", "Animals & Nature", "Flags", "Food & Drink", "Hands & Body"),
    *("Objects", "People", "Smileys & Emotion", "Symbols", "Travel & Places"),
)
EMOJI64_FLIP_CLASSES = ("Animals & Nature", "Food & Drink", "Hands & Body", "People", "Smileys & Emotion")
"""Classes whose drawings stay what they are in a mirror; the others hold letters, digits, flags and clocks."""

_MEMBER = re.compile(r"(?:(?:train|val)/[A-Za-z &]+/)?[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class UnpackResult:
    """What `unpack_emoji64` did."""

    folder: Path
    classes: tuple[str, ...]
    num_images: int
    num_written: int  # files; 0 if all were there


def unpack_emoji64(out: Path) -> UnpackResult:
    """Write emoji64 to `out` as `{train,val}/<class>/<image>`, 5,297 images of 64x64 pixels, 13 MB.

    The folder appears whole or not at all; running again does nothing, or restores files that are missing. Raises
    ArtifactError if `out` holds other files, or changed ones, or cannot be written.
    """
    out = Path(out)
    with as_file(files("varcli") / "embedded" / "emoji64.zip") as path, zipfile.ZipFile(path) as archive:
        members = {info.filename: info for info in archive.infolist()}
        for name in members:
            if not _MEMBER.fullmatch(name) or ".." in name:
                raise ArtifactError(f"`{path}` names a file outside its folder: {name!r}", "install varcli again")
        written = _restore(archive, members, out) if _is_in_use(out) else _unpack(archive, members, out)
    num_images = sum(name.endswith(".webp") for name in members)
    return UnpackResult(out, EMOJI64_CLASSES, num_images, written)


def _is_in_use(out: Path) -> bool:
    if out.exists() and not out.is_dir():
        raise ArtifactError(
            f"`{escape_path(str(out))}` is a file, but an output folder is needed", "choose another --out"
        )
    return out.is_dir() and any(out.iterdir())


def _unpack(archive: zipfile.ZipFile, members: dict[str, zipfile.ZipInfo], out: Path) -> int:
    """Unpack beside `out`, then move the whole into place."""
    out = out.absolute()
    workplace = out.parent / f".{out.name}-unpacking"
    tree = workplace / "tree"
    with hold_folder(workplace, {tree.name}, "unpacking"):
        prepare_folder(out.parent, sweep=False, need_bytes=sum(info.file_size for info in members.values()))
        shutil.rmtree(tree, ignore_errors=True)  # what a killed run left
        try:
            archive.extractall(tree)
            if out.is_dir():
                out.rmdir()
            os.replace(tree, out)
        except OSError as error:
            raise _write_error(out, error) from None
        except zipfile.BadZipFile as error:
            raise ArtifactError(
                f"the emoji64.zip of this install is damaged: {error}", "install varcli again"
            ) from None
        finally:
            shutil.rmtree(tree, ignore_errors=True)
    shutil.rmtree(workplace, ignore_errors=True)
    return len(members)


def _restore(archive: zipfile.ZipFile, members: dict[str, zipfile.ZipInfo], out: Path) -> int:
    """Add what is missing from a folder that was unpacked before."""
    present = {
        path.relative_to(out).as_posix(): path for path in out.rglob("*") if not path.is_dir() or path.is_symlink()
    }
    for name, path in sorted(present.items()):
        known = name in members and path.is_file() and not path.is_symlink()
        if not known or path.stat().st_size != members[name].file_size:
            what = "is not part of emoji64" if name not in members else "differs from emoji64"
            raise ArtifactError(f"`{escape_path(str(path))}` {what}", "choose another --out; nothing was changed")
    missing = [name for name in members if name not in present]
    try:
        for name in missing:
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            write_bytes(out / name, archive.read(name), durable=False)
    except OSError as error:
        raise _write_error(out, error) from None
    return len(missing)


def _write_error(out: Path, error: OSError) -> ArtifactError:
    return ArtifactError(f"cannot write `{escape_path(str(out))}`: {error.strerror or error}", "choose another --out")
