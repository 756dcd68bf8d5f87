"""Numbers of many steps, kept on the device until somebody looks; and the policy for steps that were no numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from varcli.errors import NumericError


class Meter:
    """Collects what `train_step` returns: one small kernel a step, one wait for the device when it is read."""

    def __init__(self) -> None:
        self._names: list[tuple[str, ...]] = []
        self._rows: list[Tensor] = []
        self._plain: dict[str, float] = {}
        self._first_step = 0

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, step: int, numbers: Mapping[str, Tensor | float | int]) -> None:
        """Take the numbers of step `step`, counted from 0.

        0-d tensors are averaged, floats keep their last value, whole numbers are counts, which add up.
        """
        if not self._rows:
            self._first_step = step
        tensors = {name: value for name, value in numbers.items() if isinstance(value, Tensor)}
        for name, value in numbers.items():
            if isinstance(value, int):
                self._plain[name] = self._plain.get(name, 0) + value
            elif not isinstance(value, Tensor):
                self._plain[name] = value
        self._names.append(tuple(tensors))
        self._rows.append(torch.stack([value.detach().float() for value in tensors.values()]))

    def read(self) -> tuple[dict[str, float], list[int]]:
        """Return means since the last reading, and the steps that were skipped, which the means leave out."""
        sums: dict[str, list[float]] = {}
        skipped = []
        for offset, (names, row) in enumerate(zip(self._names, _to_lists(self._rows), strict=True)):
            numbers = dict(zip(names, row, strict=True))
            if numbers.pop("skipped", 0):
                skipped.append(self._first_step + offset)
                continue
            for name, value in numbers.items():
                sums.setdefault(name, []).append(value)
        means = {name: math.fsum(values) / len(values) for name, values in sums.items()}
        result = {**means, **self._plain}
        self._names, self._rows, self._plain = [], [], {}
        return result, skipped


@dataclass
class SkipPolicy:
    """When skipped steps are too many: a few in a row, or some among the last thousand.

    hint: what to change then.
    """

    hint: str = "use a lower learning rate (--lr) or --precision fp32"
    in_a_row: int = 3
    in_window: int = 10
    window: int = 1000
    steps: list[int] = field(default_factory=list)  # skipped lately, rising

    def note(self, skipped: list[int], done: int) -> None:
        """Take the steps skipped since the last call, counted from 0, after `done` steps. Raises NumericError if too many."""
        self.steps = [step for step in (*self.steps, *skipped) if step > done - self.window]
        run = longest = 0
        for before, step in zip([None, *self.steps], self.steps):
            run = run + 1 if before == step - 1 else 1
            longest = max(longest, run)
        if longest >= self.in_a_row or len(self.steps) >= self.in_window:
            shown = ", ".join(f"{step + 1:,}" for step in self.steps[-self.in_window :])
            raise NumericError(
                f"loss or gradients were no numbers at steps {shown}: training stopped, the weights are as before them",
                f"{self.hint}; metrics.jsonl and the last checkpoint, if there is one, are kept",
            )


def _to_lists(rows: list[Tensor]) -> list[list[float]]:
    """Copy rows of any lengths to the host at once."""
    if not rows:
        return []
    flat = torch.cat(rows).tolist()
    lists, start = [], 0
    for row in rows:
        lists.append(flat[start : start + len(row)])
        start += len(row)
    return lists
