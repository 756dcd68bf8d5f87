"""The errors callers get: what was expected, what came, and in `hint` what to do."""

from __future__ import annotations

import difflib
import errno
import re
from collections.abc import Iterable, Iterator

# what torch's, Triton's and NCCL's errors say that have no class of their own for it
_NO_MEMORY = re.compile(
    r"out of memory|can't allocate memory|cannot allocate memory|not enough memory|_ALLOC_FAILED", re.I
)


class VarcliError(Exception):
    """Base of every error that is the caller's to mend; `exit_code` is the process's exit status."""

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


class ConfigError(VarcliError):
    """A setting, or a combination of settings, that cannot work."""


class ShapeError(VarcliError):
    """A tensor whose shape, dtype or range is not what the function takes."""


class DataError(VarcliError):
    """Images or labels that cannot be used as they are."""


class ArtifactError(VarcliError):
    """A file or folder that is missing, unreadable or of another kind than expected."""


class IntegrityError(ArtifactError):
    """A file whose bytes differ from what its manifest says."""

    exit_code = 3


class UnsafeFileError(ArtifactError):
    """A file that is refused because reading it could run code or harm the process."""

    exit_code = 4


class LockedError(ArtifactError):
    """An output folder that another process is writing."""

    exit_code = 5


class SkipLimitError(DataError):
    """More inputs were skipped than allowed; what was finished is kept."""

    exit_code = 6


class NumericError(VarcliError):
    """Training stopped because the loss is no longer a number."""

    exit_code = 7


class MemoryLimitError(VarcliError):
    """The device or the machine has no more memory; the hint says what to make smaller."""

    exit_code = 8


class LostProcessError(VarcliError):
    """Another process of the same job is gone, and with it what this one waits for."""


class InterruptedRun(VarcliError):
    """A signal arrived, the state was saved, and the same command goes on."""

    exit_code = 75


class Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a command as Ctrl-C does; raised in the main thread wherever it is, and nobody's to mend."""


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether an error, or one that it wraps, is about memory that ran out: the device's or the machine's."""
    return any(
        {"MemoryError", "OutOfMemoryError"}
        & {cls.__name__ for cls in type(one).__mro__}  # torch's by name, without torch
        or (isinstance(one, RuntimeError) and _NO_MEMORY.search(str(one)))
        or (isinstance(one, OSError) and one.errno == errno.ENOMEM)
        for one in with_causes(error)
    )


def with_causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and what it came from, as torch's compiler or Python's `from` keeps it."""
    while error is not None:
        yield error
        error = getattr(error, "inner_exception", None) or error.__cause__


def closest_names(name: str, known: Iterable[str], count: int = 3) -> list[str]:
    """Return up to `count` entries of `known` nearest in spelling to `name`, ignoring case."""
    by_folded = {entry.casefold(): entry for entry in known}
    matches = difflib.get_close_matches(name.casefold(), list(by_folded), n=count, cutoff=0.4)
    return [by_folded[match] for match in matches]


def unknown_name(kind: str, name: str, known: Iterable[str], error: type[VarcliError] = ConfigError) -> VarcliError:
    """Build the error for a name that is not in `known`; the hint lists the nearest, or all of a short list.

    kind: what the name stands for, e.g. "class" or "config key". Returns the error, for the caller to raise.
    """
    entries = sorted(known)
    near = closest_names(name, entries)
    if len(entries) <= 12:
        hint = f"known: {', '.join(entries)}" if entries else f"there is no {kind} to choose from"
    elif near:
        hint = f"nearest of {len(entries)}: {', '.join(near)}"
    else:
        hint = f"{len(entries)} are known, e.g. {', '.join(entries[:6])}"
    return error(f"unknown {kind} `{name}`", hint=hint)
