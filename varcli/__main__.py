"""The process itself: what the `varcli` script, `python -m varcli` and `torchrun -m varcli` start.

It imports next to nothing before Ctrl-C is cared for, since the imports take a second or more.
"""

from __future__ import annotations

import _thread
import sys
import threading
from typing import Any

_AGAIN_AFTER = 0.05  # seconds; by then Python is out of the corner that dropped the interrupt


def main() -> None:
    """Run the program on the process's arguments, so that Ctrl-C ends it with a word and code 130 at any moment."""
    sys.unraisablehook = _interrupt_again
    try:
        from varcli.cli.app import main as run

        run()
    except KeyboardInterrupt:
        from varcli.cli import console

        sys.exit(console.interrupted())


def _interrupt_again(unraisable: Any) -> None:
    """Raise a Ctrl-C anew that Python would drop: it arrived in a callback, such as those that end an import."""
    if not isinstance(unraisable.exc_value, KeyboardInterrupt):
        sys.__unraisablehook__(unraisable)
        return
    again = threading.Timer(_AGAIN_AFTER, _thread.interrupt_main)
    again.daemon = True
    again.start()


if __name__ == "__main__":
    main()
