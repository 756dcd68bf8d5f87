"""How the core tells a caller how far it is: plain records handed to an `on_step` callback."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Step:
    """One report of a long job: `done` of `total` units (None if unknown), with numbers worth showing."""

    done: int
    total: int | None
    unit: str = "steps"
    values: dict[str, float] = field(default_factory=dict)  # e.g. {"loss": 4.2}
    message: str | None = None  # a line worth keeping in the log; None for most steps
    details: Mapping[str, Any] = field(default_factory=dict)  # for displays with more room; what it holds, the job says


OnStep = Callable[[Step], None]


def ignore(step: Step) -> None:
    """The default `on_step`: report nothing."""


def format_seconds(seconds: float) -> str:
    """Write a duration for people: `8s`, `3m05s`, `2h10m`, `4d03h`."""
    seconds = max(0, round(seconds))
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    if seconds < 86400:
        return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"
    return f"{seconds // 86400}d{seconds % 86400 // 3600:02d}h"


def counted(count: int, noun: str, plural: str | None = None) -> str:
    """Write a number of things for people: `1 image`, `1,024 images`. plural: None adds an s."""
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"
