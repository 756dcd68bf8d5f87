"""The process itself: what the `varcli` script, `python -m varcli` and `torchrun -m varcli` start.

It imports next to nothing before Ctrl-C and SIGTERM are cared for, since the imports take a second or more.
"""

from __future__ import annotations

import _thread
import os
import signal
import sys
import threading
from types import FrameType
from typing import Any

from varcli.errors import Terminated

_AGAIN_AFTER = 0.05  # seconds; by then Python is out of the corner that dropped the interrupt


def main() -> None:
    """Run the program on the process's arguments, so that Ctrl-C ends it with a word and code 130 at any moment.

    So does SIGTERM, with code 75. Of several processes torchrun tells who was stopped by what, and each ends at once: one
    that waits for another does so outside of Python, where no signal would reach it.
    """
    sys.unraisablehook = _interrupt_again
    if os.environ.get("WORLD_SIZE", "1") == "1" and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _terminate)
    try:
        from varcli.cli.app import main as run

        run()
    except KeyboardInterrupt as error:
        from varcli.cli import console

        sys.exit(console.interrupted(error))


def _terminate(number: int, frame: FrameType | None) -> None:
    raise Terminated


def _interrupt_again(unraisable: Any) -> None:
    """Raise a Ctrl-C or SIGTERM anew that Python would drop: it arrived in a callback, such as those that end an import."""
    if not isinstance(unraisable.exc_value, KeyboardInterrupt):
        sys.__unraisablehook__(unraisable)
        return
    number = signal.SIGTERM if isinstance(unraisable.exc_value, Terminated) else signal.SIGINT
    again = threading.Timer(_AGAIN_AFTER, _thread.interrupt_main, [number])
    again.daemon = True
    again.start()


if __name__ == "__main__":
    main()
