"""Learning rate and weight decay as functions of the step: the released trainer's schedules, by their names there."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

from varcli.errors import ConfigError, unknown_name

_LATE = 0.15  # share of the steps after warm-up that `lin` and `exp` stay at the peak
_EARLY = 0.05  # the same of `lin0`


def _plateau_then_linear(plateau: float) -> Callable[[float, float], float]:
    return lambda done, final: 1.0 if done < plateau else final + (1 - final) * (1 - done) / (1 - plateau)


def _cosine(done: float, final: float) -> float:
    return final + (1 - final) * (0.5 + 0.5 * math.cos(math.pi * done))


def _exponential(done: float, final: float) -> float:
    return 1.0 if done < _LATE else final ** ((done - _LATE) / (1 - _LATE))


def _constant(done: float, final: float) -> float:
    return 1.0


SHAPES: dict[str, Callable[[float, float], float]] = {
    "lin0": _plateau_then_linear(_EARLY),
    "lin": _plateau_then_linear(_LATE),
    "lin00": lambda done, final: final + (1 - final) * (1 - done),
    "cos": _cosine,
    "exp": _exponential,
    "constant": _constant,
}
"""Factor on the peak after warm-up, from (share of the remaining steps done, final factor). The paper's is `lin0`."""


def find_shape(name: str) -> Callable[[float, float], float]:
    """Return the function behind a schedule's name; `lin0.5` and the like bend at that share of the steps.

    Raises ConfigError for an unknown name.
    """
    if name in SHAPES:
        return SHAPES[name]
    match = re.fullmatch(r"lin(0?\.\d+)", name)
    bend = float(match[1]) if match else 0.0
    if not 0 < bend < 1:
        raise unknown_name("schedule", name, [*SHAPES, "lin0.5"])

    def bent(done: float, final: float) -> float:
        middle = (1 + final + (1 - final) * (1 - bend)) / 2
        if done < bend:
            return 1 + (middle - 1) * done / bend
        return final + (middle - final) * (1 - done) / (1 - bend)

    return bent


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """What the optimizer is set to before each step. Source: VAR's released trainer."""

    total_steps: int  # optimizer steps of the whole run
    learning_rate: float  # peak
    shape: str = "lin0"  # a name of SHAPES, or lin<share>
    warmup_steps: int = 0  # optimizer steps of linear rise
    warmup_start: float = 0.005  # factor on the peak at step 0
    final: float = 0.01  # factor on the peak at the last step
    weight_decay: float = 0.05  # at the first step, of the decayed parameters
    final_weight_decay: float | None = None  # at the last step, reached along a cosine; None keeps weight_decay

    def __post_init__(self) -> None:
        find_shape(self.shape)
        if self.total_steps < 1 or not 0 <= self.warmup_steps <= self.total_steps:
            raise ConfigError(
                f"a schedule needs at least 1 step and a warm-up within it, but has {self.total_steps} steps "
                f"and {self.warmup_steps} of warm-up",
                "lower warmup_steps or raise steps",
            )
        if self.learning_rate <= 0 or not 0 < self.final <= 1:
            raise ConfigError("learning_rate must be above 0 and its final share in (0, 1]")

    def learning_rate_at(self, step: int) -> float:
        """Learning rate of step `step`, counted from 0."""
        if step < self.warmup_steps:
            start = self.warmup_start
            return self.learning_rate * (start + (1 - start) * step / self.warmup_steps)
        done = (step - self.warmup_steps) / max(self.total_steps - 1 - self.warmup_steps, 1)
        return self.learning_rate * find_shape(self.shape)(min(done, 1.0), self.final)

    def weight_decay_at(self, step: int) -> float:
        """Weight decay of step `step` for the decayed parameters; there is no warm-up."""
        end = self.weight_decay if self.final_weight_decay is None else self.final_weight_decay
        done = min(step / max(self.total_steps - 1, 1), 1.0)
        return end + (self.weight_decay - end) * (0.5 + 0.5 * math.cos(math.pi * done))
