"""What people and programs see: results, tables, progress with and without a terminal."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

import varcli
from varcli.cli import console
from varcli.progress import Step

PACKAGE = Path(varcli.__file__).parent


def test_printable_leaves_text_alone_and_shows_what_is_hidden():
    text = "Fußgänger 🚶 [/x]\n\ttab"
    assert console.printable(text) == text
    assert console.printable("a\x00b\x9bc") == "a\\x00b\\x9bc"


def test_results_and_remarks_go_to_different_streams(capsys: pytest.CaptureFixture[str]):
    console.result("done")
    console.note("chose cpu")
    seen = capsys.readouterr()
    assert (seen.out, seen.err) == ("done\n", "chose cpu\n")


def test_table_aligns_numbers_to_the_right(capsys: pytest.CaptureFixture[str]):
    console.table(["set", "KID"], [["model", "0.5"], ["real", "0.0123"]], title="measured")
    assert capsys.readouterr().out == "measured\nset       KID\n-----  ------\nmodel     0.5\nreal   0.0123\n"


def test_progress_without_terminal_is_lines(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    now = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    on_step = console.progress("training")
    for done in range(1, 25):
        now[0] += 1.0
        on_step(Step(done, 24, values={"loss": 4.0}, message="saved" if done == 7 else None))
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "training: 5/24 steps, 1 steps/s, 19s left, loss 4",
        "saved",
        "training: 10/24 steps, 1 steps/s, 14s left, loss 4",
        "training: 15/24 steps, 1 steps/s, 9s left, loss 4",
        "training: 20/24 steps, 1 steps/s, 4s left, loss 4",
        "training: 24/24 steps, 1 steps/s, loss 4",
    ]


def test_the_end_is_told_once_whatever_is_said_after_it(capsys: pytest.CaptureFixture[str]):
    on_step = console.progress("training")
    for message in (None, "validation: loss 4", "evaluation: fid 3"):
        on_step(Step(2, 2, values={"loss": 4.0}, message=message))
    on_step(Step(2, 2, values={"loss": 3.0}))  # another job of the same length
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "training: 2/2 steps, loss 4",
        "validation: loss 4",
        "evaluation: fid 3",
        "training: 2/2 steps, loss 3",
    ]


def test_rate_of_a_resumed_job_counts_from_where_it_went_on(monkeypatch: pytest.MonkeyPatch):
    now = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    clock = console.Clock()
    clock.update(Step(1000, 1100))
    now[0] = 10.0
    clock.update(Step(1050, 1100))
    assert clock.rate == pytest.approx(5.0)


def test_a_job_in_other_units_has_a_rate_of_its_own(monkeypatch: pytest.MonkeyPatch):
    now = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    clock = console.Clock()
    for second in range(1, 21):
        now[0] += 1.0
        clock.update(Step(second, 20, "images"))
    clock.update(Step(60, 60))  # of a finished run, without a step of its own
    assert clock.rate is None


@pytest.fixture
def terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(console, "is_terminal", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("FORCE_COLOR", "1")  # what rich asks
    monkeypatch.delenv("NO_COLOR", raising=False)
    return capsys


def test_progress_on_a_terminal_is_a_bar_that_closes_itself(terminal: pytest.CaptureFixture[str]):
    on_step = console.progress("[/x] sampling")
    on_step(Step(1, 2, "images", {"loss": 1.5}))
    assert console.Bar.running is on_step
    on_step(Step(2, 2, "images", message="[bold] half \x1b"))
    assert console.Bar.running is None
    seen = terminal.readouterr().err
    assert "[/x] sampling" in seen
    assert "2/2 images" in seen
    assert "[bold] half \\x1b" in seen
    assert seen.rstrip().endswith("\x1b[?25h")  # the cursor is given back


def test_what_is_said_after_the_end_draws_no_second_bar(terminal: pytest.CaptureFixture[str]):
    on_step = console.progress("training")
    on_step(Step(2, 2))
    terminal.readouterr()
    on_step(Step(2, 2, message="validation: loss 4"))
    assert terminal.readouterr().err == "validation: loss 4\n"


def test_anything_printed_closes_the_bar_first(terminal: pytest.CaptureFixture[str]):
    on_step = console.progress("sampling")
    on_step(Step(1, 2))
    console.error("bad")
    assert console.Bar.running is None


def test_colour_obeys_no_color(terminal: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    console.error("bad")
    assert terminal.readouterr().err == "\x1b[1;31merror:\x1b[0m bad\n"
    monkeypatch.setenv("NO_COLOR", "1")
    console.error("bad")
    assert terminal.readouterr().err == "error: bad\n"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0s"), (59, "59s"), (61, "1m01s"), (3660, "1h01m"), (90_000, "1d01h")]
)
def test_durations_read_well(seconds: float, text: str):
    assert console.format_seconds(seconds) == text


def test_next_commands_can_be_pasted_whatever_the_paths(capsys: pytest.CaptureFixture[str]):
    console.next_command("train", Path("my codes"), "--depth", 6, "--tokenizer", "$HOME/it's")
    words = ["varcli", "train", "my codes", "--depth", "6", "--tokenizer", "$HOME/it's"]
    assert shlex.split(capsys.readouterr().err.removeprefix("next: ")) == words


@pytest.mark.parametrize("path", sorted((PACKAGE / "cli").glob("*.py")), ids=lambda path: path.name)
def test_no_command_writes_a_next_line_of_its_own(path: Path):
    assert path.name == "console.py" or '"next: ' not in path.read_text(encoding="utf-8")
