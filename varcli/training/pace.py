"""What a run takes, measured on its first steps: rate, time left, what it costs in hours of its GPUs, and memory."""

from __future__ import annotations

import time

import torch

from varcli.progress import format_seconds
from varcli.training.plan import wait_for

_FIRST, _LAST = 5, 20  # steps of a session: those before compile and warm up, those between are measured


class Pace:
    """Watches the first steps of a session and tells once what they showed.

    Only the two ends wait for the device. planned, planned_bytes: seconds a step and the peak of memory that the plan told,
    None if there was none.
    """

    def __init__(
        self,
        batch_size: int,
        num_devices: int,
        device: torch.device,
        planned: float | None = None,
        planned_bytes: int | None = None,
    ) -> None:
        self.batch_size, self.num_devices, self.device = batch_size, num_devices, device
        self.planned, self.planned_bytes = planned, planned_bytes
        self._count = 0
        self._since = 0.0

    def pause(self, seconds: float) -> None:
        """Leave out time that went into something else than steps; the device had nothing left to do when it began."""
        self._since += seconds

    def note(self, steps_left: int) -> str | None:
        """Count a step; return a line for people after the one that ends the measurement, if steps are left."""
        self._count += 1
        if self._count == _FIRST:
            wait_for(self.device)
            self._since = time.monotonic()
        if self._count != _LAST or not steps_left:
            return None
        wait_for(self.device)
        peak = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else None
        return self.describe((time.monotonic() - self._since) / (_LAST - _FIRST), steps_left, peak)

    def describe(self, step_seconds: float, steps_left: int, peak_bytes: int | None = None) -> str:
        """Say what `steps_left` steps of `step_seconds` mean; validation, pictures and checkpoints come on top."""
        left = step_seconds * steps_left
        text = f"measured: {self.batch_size / max(step_seconds, 1e-9):,.4g} images/s, {format_seconds(left)} left"
        if self.device.type == "cuda":
            text += f", {left * self.num_devices / 3600:,.3g} GPU-hours"
        if self.planned is not None:
            text += f" (the plan said {format_seconds(self.planned * steps_left)})"
        if peak_bytes is not None:
            text += f", peak {peak_bytes / 2**30:.1f} GiB"
            text += f" ({self.planned_bytes / 2**30:.1f})" if self.planned_bytes is not None else ""
        return text
