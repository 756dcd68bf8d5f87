"""Fine-tuning: the model that a run starts or was started from, found and held against what the run remembers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from varcli.errors import ArtifactError, ConfigError
from varcli.training.run import RunFolder


@dataclass(frozen=True, kw_only=True)
class Parent:
    """The model that a run was begun with."""

    fingerprint: str  # of it
    folder: Path | None  # where it lies; None if the run has weights of its own already


AnyParent = TypeVar("AnyParent", bound=Parent)


def find_parent(
    run: RunFolder,
    init_from: Path | str | None,
    kind: str,
    read: Callable[[Path | str], AnyParent],
    remember: Callable[[str, Mapping[str, Any]], AnyParent],
) -> AnyParent | None:
    """Return what a run of `kind` starts or was started from; None if that is nothing.

    read: opens what init_from names. remember: makes it from the fingerprint and the config of a run that has weights of
    its own. A run with a checkpoint does not need init_from again; if it is given and still there it must be the same.
    Raises ConfigError if it is another one than the run's, ArtifactError if there is none.
    """
    known = None if run.stored is None else run.stored.get("inputs", {}).get("init_from")
    if run.checkpoint is None:
        if init_from is None and known is not None:
            raise ConfigError(
                f"`{run.path}` was begun from the {kind} {known}, and has no checkpoint yet",
                "name it again with --init-from, or choose another --out",
            )
        return None if init_from is None else read(init_from)
    if init_from is not None:
        try:
            found = read(init_from).fingerprint
        except ArtifactError:
            found = known or str(init_from)
        if found != known:
            begun = f"from the {kind} {known}" if known else "without --init-from"
            raise ConfigError(
                f"`{run.path}` was begun {begun}, but `{init_from}` is {found}",
                "choose another --out for a new run, or leave out --init-from to go on with this one",
            )
    return None if known is None or run.config is None else remember(known, run.config)
