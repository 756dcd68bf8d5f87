"""Questions to the Hugging Face Hub: which bytes a name stands for, and whether they are on this machine already.

huggingface_hub answers them, so that its settings count: HF_ENDPOINT, HF_HOME, HF_HUB_OFFLINE and the user's token. The
bytes themselves come through `artifacts.fetch`: the library drops what a killed download had brought, and draws bars.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from varcli.artifacts.manifest import FileEntry, hash_file
from varcli.errors import ArtifactError, IntegrityError
from varcli.progress import OnStep, Step, ignore

_SHA256 = re.compile(r"[0-9a-f]{64}")
_ATTEMPTS = 3


@dataclass(frozen=True, kw_only=True)
class HubFile:
    """One version of a file on the Hub."""

    url: str  # of this version, whatever is committed later
    size: int  # bytes
    sha256: str | None  # as the Hub notes it for large files; None if it does not
    headers: dict[str, str]  # what the Hub wants to see: the user's token, if there is one


def find_cached(repo: str, name: str, revision: str) -> Path | None:
    """Return the file in huggingface_hub's own cache, where other programs may have put it, or None.

    Raises ArtifactError if huggingface_hub is not installed.
    """
    found = _library().try_to_load_from_cache(repo, name, revision=revision)
    return Path(found) if isinstance(found, str) else None  # the library has an object for "known to be missing"


def hash_cached(path: Path) -> FileEntry:
    """Hash a file of that cache. Raises IntegrityError if it is not the one that its place there is named for."""
    entry = hash_file(path)
    name = path.resolve().name  # the cache keeps large files under their SHA-256
    if _SHA256.fullmatch(name) and name != entry.sha256:
        raise IntegrityError(
            f"`{path}` has SHA-256 {entry.sha256[:12]}..., but the cache knows it as {name[:12]}...",
            f"delete `{path.resolve()}`, it was damaged or edited, and run the same command again",
        )
    return entry


def ask_hub(repo: str, name: str, revision: str, *, pause: float = 1.0, on_step: OnStep = ignore) -> HubFile:
    """Ask which version of a file is current, trying again after `pause` seconds if the answer does not come.

    Raises ArtifactError if the Hub cannot be reached, does not have the file or is no Hub.
    """
    library = _library()
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            found = library.get_hf_file_metadata(library.hf_hub_url(repo, name, revision=revision))
            break
        except Exception as error:  # httpx's, requests' or its own, by the library's version
            if attempt == _ATTEMPTS or not _may_pass(error):
                raise ArtifactError(f"cannot fetch `{name}` of {repo}: {_reason(error)}") from error
            on_step(Step(0, None, unit="bytes", message=f"no answer ({_first_line(error)}), trying again"))
        time.sleep(pause * attempt)
    if found.commit_hash is None or found.size is None:
        raise ArtifactError(
            f"cannot fetch `{name}` of {repo}: what answers is not the Hugging Face Hub (HF_ENDPOINT, or a proxy)"
        )
    etag = (found.etag or "").lower()
    headers = library.utils.build_hf_headers()
    return HubFile(
        url=library.hf_hub_url(repo, name, revision=found.commit_hash),
        size=found.size,
        sha256=etag if _SHA256.fullmatch(etag) else None,
        headers={key: value for key, value in headers.items() if key.lower() == "authorization"},
    )


def _library() -> Any:
    try:
        import huggingface_hub.errors
        import huggingface_hub.utils
    except ImportError:
        raise ArtifactError("huggingface_hub is not installed: `pip install huggingface_hub`") from None
    return huggingface_hub


def _may_pass(error: Exception) -> bool:
    """Say whether asking again can help: the connection broke, or the server is busy."""
    status = _status(error)
    return not isinstance(error, _library().errors.OfflineModeIsEnabled) and (
        status is None or status >= 500 or status in (408, 429)
    )


def _reason(error: Exception) -> str:
    errors = _library().errors
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, and it is not in the cache"
    if isinstance(error, errors.EntryNotFoundError):
        return "the repository has no such file (404)"
    if isinstance(error, errors.GatedRepoError):
        return "its authors ask for a login (log in with `hf auth login`)"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"there is no such repository, or it is not open to you ({_status(error)})"
    if (status := _status(error)) is not None:
        return f"the server answered {status}"
    return f"no network, or the server cannot be reached ({_first_line(error)})"


def _status(error: Exception) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__
