"""Signals that ask a run to stop: noted at once, acted on when a step is done."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any, Self

_NAMES = ("SIGINT", "SIGTERM", "SIGUSR1")  # Ctrl-C; a scheduler's end; a scheduler's warning


class StopRequest:
    """While entered, the first SIGINT, SIGTERM or SIGUSR1 is noted in `number`; a second SIGINT leaves at once.

    Outside the main thread, where Python allows no handlers, it notes nothing.
    """

    def __init__(self) -> None:
        self.number = 0  # of the first signal, 0 for none
        self._previous: dict[int, Any] = {}

    @property
    def name(self) -> str | None:
        """Name of the signal that came first, None if none has come."""
        return signal.Signals(self.number).name if self.number else None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for name in _NAMES:
                if hasattr(signal, name):  # Windows lacks SIGUSR1
                    number = getattr(signal, name)
                    self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.number and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.number = self.number or number
