"""How the core tells a caller how far it is: plain records handed to an `on_step` callback."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Step:
    """One report of a long job: `done` of `total` units (None if unknown), with numbers worth showing."""

    done: int
    total: int | None
    unit: str = "steps"
    values: dict[str, float] = field(default_factory=dict)  # e.g. {"loss": 4.2}
    message: str | None = None  # a line worth keeping in the log; None for most steps


OnStep = Callable[[Step], None]


def ignore(step: Step) -> None:
    """The default `on_step`: report nothing."""
