"""What commands print: results on stdout, everything else on stderr, and nothing that a foreign name could distort."""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
import time
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

from varcli.errors import Terminated
from varcli.progress import OnStep, Step, format_seconds

INTERRUPTED = 130  # exit code of Ctrl-C, as shells give it
TERMINATED = 75  # of SIGTERM: to run the command again is worth it, which a scheduler may know
_LINE_EVERY = 5.0  # seconds between progress lines where there is no terminal
_HIDDEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    r"""Return `text` with control characters, direction marks and undecodable bytes as `\xNN` or `\uNNNN`.

    Newlines and tabs stay.
    """
    return _HIDDEN.sub(lambda match: match.group().encode("unicode_escape").decode("ascii"), text)


def one_line(text: str) -> str:
    r"""Return `text` as `printable`, and newlines and tabs as `\x0a` and `\x09`: a name that must not break a line."""
    return printable(text).replace("\n", "\\x0a").replace("\t", "\\x09")


def result(text: str) -> None:
    """Print a result for people to stdout."""
    close_progress()
    print(printable(text))


def json_result(value: Any) -> None:
    """Print a result for programs to stdout, as one JSON value."""
    close_progress()
    print(json.dumps(value, indent=1, ensure_ascii=True, default=str))


def json_lines(values: Iterable[Any]) -> None:
    """Print results for programs to stdout, one JSON value a line."""
    close_progress()
    for value in values:
        print(json.dumps(value, ensure_ascii=True, default=str), flush=True)


def report(value: Any, as_json: bool, text: str) -> None:
    """Print `value` as JSON if `as_json`, else `text`: the last line of most commands."""
    if as_json:
        json_result(value)
    else:
        result(text)


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], title: str | None = None) -> None:
    """Print an aligned table to stdout; columns after the first are set to the right."""
    close_progress()
    cells = [[one_line(str(cell)) for cell in row] for row in (columns, *rows)]
    widths = [max(len(row[index]) for row in cells) for index in range(len(columns))]
    lines = ["  ".join(_aligned(row, widths)).rstrip() for row in cells]
    lines.insert(1, "  ".join("-" * width for width in widths))
    if title:
        lines.insert(0, printable(title))
    print("\n".join(lines))


def note(text: str) -> None:
    """Print a remark to stderr: what was chosen, what was skipped, what to do next."""
    close_progress()
    print(printable(text), file=sys.stderr, flush=True)


def command(*words: object) -> str:
    """Write `varcli` and its words as one line to be typed: a path with spaces or signs of the shell is quoted."""
    return shlex.join(["varcli", *map(str, words)])


def next_command(*words: object) -> None:
    """Print to stderr the command that usually comes next, e.g. `next: varcli train codes --depth 6`."""
    note(f"next: {command(*words)}")


def error(message: str, hint: str | None = None) -> None:
    """Print `error: message` and, after an empty line, `hint: hint` to stderr."""
    close_progress()
    red, plain = ("\x1b[1;31m", "\x1b[0m") if _has_colour() else ("", "")
    text = f"{red}error:{plain} {printable(message)}"
    if hint:
        text += f"\n\nhint: {printable(hint)}"
    print(text, file=sys.stderr, flush=True)


def interrupted(by: KeyboardInterrupt) -> int:
    """Tell that Ctrl-C or SIGTERM ended the command, and return the exit code that belongs to it."""
    is_terminated = isinstance(by, Terminated)
    what = "stopped by SIGTERM" if is_terminated else "interrupted"
    error(what, "run the same command again: what it finished and kept is not done anew")
    return TERMINATED if is_terminated else INTERRUPTED


def progress(description: str) -> OnStep:
    """Return an `on_step` callback that shows how far a job is, on stderr.

    On a terminal a bar with done/total, rate, time left and the step's values; elsewhere a plain line every few seconds
    and at the end. It closes by itself when the job is done or something else is printed.
    """
    return Bar(description) if is_terminal() else Lines(description)


def close_progress() -> None:
    """Take the running display, if there is one, off the terminal's last lines."""
    if Display.running is not None:
        Display.running.stop()


def format_values(values: dict[str, float]) -> str:
    """Write a step's numbers in one line, four significant digits each: `loss 4.213  lr 0.0001`."""
    return "  ".join(f"{printable(name)} {value:.4g}" for name, value in values.items())


class Lines:
    """Progress without a terminal: a line now and then."""

    def __init__(self, description: str) -> None:
        self.description = description
        self.clock = Clock()
        self.last_line = time.monotonic()
        self.end = End()

    def __call__(self, step: Step) -> None:
        if step.message:
            note(step.message)
        if self.end.is_told(step):
            return
        self.clock.update(step)
        now = time.monotonic()
        if step.done == step.total or now - self.last_line >= _LINE_EVERY:
            self.last_line = now
            print(printable(f"{self.description}: {self.clock.describe(step)}"), file=sys.stderr, flush=True)


class Display:
    """What rich keeps drawing on the terminal's last lines; one at a time."""

    running: ClassVar[Display | None] = None

    def __init__(self) -> None:
        self.display: Any = None

    def show(self, display: Any) -> None:
        """Begin to draw `display`, a Live or Progress of rich. Another one that still runs is closed first."""
        close_progress()
        self.display = display
        self.display.start()
        Display.running = self

    def say(self, message: str) -> None:
        """Print a line above what is drawn."""
        self.display.console.print(printable(message), markup=False, highlight=False, emoji=False)

    def stop(self) -> None:
        """Leave what is drawn as it stands and give the terminal back."""
        if self.display is not None:
            self.display.stop()
        self.display, Display.running = None, None


class Bar(Display):
    """Progress on a terminal: one live line."""

    def __init__(self, description: str) -> None:
        super().__init__()
        self.description = description
        self.clock = Clock()
        self.task: Any = None
        self.end = End()

    def __call__(self, step: Step) -> None:
        if self.end.is_told(step):
            if step.message:
                note(step.message)
            return
        if self.display is None:
            self.start(step)
        self.clock.update(step)
        if step.message:
            self.say(step.message)
        self.display.update(self.task, completed=step.done, total=step.total, status=self.clock.describe(step))
        if step.done == step.total:
            self.stop()

    def start(self, step: Step) -> None:
        """Draw the bar."""
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        self.clock = Clock()
        columns = (TextColumn("{task.description}", markup=False), BarColumn(bar_width=24))
        display = Progress(
            *columns, TextColumn("{task.fields[status]}", markup=False), console=Console(stderr=True), transient=False
        )
        self.task = display.add_task(printable(self.description), total=step.total, status="")
        self.show(display)


class End:
    """Whether the end of a job was shown already: what is said after it, such as how a validation went, is no second end."""

    def __init__(self) -> None:
        self.last: tuple[object, ...] | None = None

    def is_told(self, step: Step) -> bool:
        """Take a report; say whether it is the end, and as the report before it was."""
        before, self.last = self.last, (step.done, step.total, step.unit, tuple(step.values.items()))
        return step.done == step.total and self.last == before


class Clock:
    """Rate and time left, counted from the first step seen, so that a resumed job is not flattered by its past."""

    def __init__(self) -> None:
        self.first: tuple[int, float] | None = None
        self.last = 0  # units done; fewer than before means that another pass began
        self.unit: str | None = None  # of the last report; another one means another job
        self.rate: float | None = None  # units per second
        self.seen = 0.0  # when the last report came, by time.monotonic

    def update(self, step: Step) -> None:
        """Take a report."""
        now = time.monotonic()
        if self.first is None or step.done < self.last or step.unit != self.unit:
            self.first = (step.done, now)
        self.last, self.unit, self.seen = step.done, step.unit, now
        done, seconds = step.done - self.first[0], now - self.first[1]
        self.rate = done / seconds if done > 0 and seconds > 0 else None

    def seconds_left(self, step: Step) -> float | None:
        """Seconds until all is done at this rate; None while it is not known."""
        return None if step.total is None or not self.rate else (step.total - step.done) / self.rate

    def describe(self, step: Step) -> str:
        """Write how far it is, how fast, and what is left, in one line."""
        parts = [
            f"{step.done:,}/{step.total:,} {step.unit}" if step.total is not None else f"{step.done:,} {step.unit}"
        ]
        if self.rate is not None:
            rate = f"{self.rate:,.0f}" if self.rate >= 10 else f"{self.rate:.2g}"
            parts.append(f"{rate} {step.unit}/s")
            if left := self.seconds_left(step):
                parts.append(f"{format_seconds(left)} left")
        if step.values:
            parts.append(format_values(step.values))
        return ", ".join(parts)


def _aligned(row: Sequence[str], widths: Sequence[int]) -> list[str]:
    return [
        cell.ljust(width) if index == 0 else cell.rjust(width) for index, (cell, width) in enumerate(zip(row, widths))
    ]


def is_terminal() -> bool:
    """Say whether stderr is a terminal that can be drawn on."""
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


def _has_colour() -> bool:
    return is_terminal() and not os.environ.get("NO_COLOR")
