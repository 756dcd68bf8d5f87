"""Signals that ask a run to stop: noted at once, acted on when a step is done."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, Self

_NAMES = ("SIGINT", "SIGTERM", "SIGUSR1")  # Ctrl-C; a scheduler's end; a scheduler's warning
_TOLD_AFTER = 1.0  # seconds; most steps are done by then, and the run's last words say the same


class StopRequest:
    """While entered, the first SIGINT, SIGTERM or SIGUSR1 is noted in `number`; a second SIGINT leaves at once.

    Outside the main thread, where Python allows no handlers, it notes nothing. tell: told, from another thread, that the
    signal was heard, if it has not been acted on a second later.
    """

    def __init__(self, tell: Callable[[str], None] = lambda message: None) -> None:
        self.number = 0  # of the first signal, 0 for none
        self._previous: dict[int, Any] = {}
        self._tell = threading.Timer(_TOLD_AFTER, lambda: tell(self._heard()))
        self._tell.daemon = True

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
        self._tell.cancel()
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.number and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self.number:
            self._tell.start()  # a handler that prints could fall into the middle of another print
        self.number = self.number or number

    def _heard(self) -> str:
        return (
            f"{self.name}: the run stops after this step and saves its state; Ctrl-C now leaves at once, without that"
        )
