"""Every command shows its help; every error becomes a message, a hint and an exit code."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from varcli.cli import console
from varcli.cli.app import COMMANDS, app, guarded
from varcli.errors import ConfigError, IntegrityError, InterruptedRun, LockedError, Terminated, UnsafeFileError

ROOT = Path(__file__).resolve().parents[2]
REGISTERED = {command.name: command.callback for command in app.registered_commands} | {
    f"{group.name} {command.name}": command.callback
    for group in app.registered_groups
    for command in group.typer_instance.registered_commands
}


class OutOfMemoryError(RuntimeError):
    """Stands for torch's, which the program knows by name."""


def _run(error: BaseException | None, *arguments: str):
    """Run a one-command program that raises `error`."""
    program = typer.Typer()

    @program.command()
    @guarded
    def act(times: Annotated[int, typer.Option("--times", help="How often.")] = 1) -> None:
        """Act."""
        if error is not None:
            raise error
        console.result(f"done {times}")

    return CliRunner().invoke(program, list(arguments))


def test_program_lists_its_commands():
    done = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "200"})
    assert done.exit_code == 0
    for name in REGISTERED:
        assert f" {name.split()[0]} " in done.stdout


def test_table_and_program_hold_the_same_commands():
    assert sorted(COMMANDS) == sorted(REGISTERED)


@pytest.mark.parametrize("name", REGISTERED)
def test_command_explains_itself(name: str):
    done = CliRunner().invoke(app, [*name.split(), "--help"], env={"COLUMNS": "200", "NO_COLOR": "1"})
    assert done.exit_code == 0, done.output
    first_line = REGISTERED[name].__doc__.splitlines()[0]
    assert first_line in done.stdout  # whole: nothing in it was taken for markup
    assert first_line.endswith(".")
    command = typer.main.get_command(app)
    for word in name.split():
        command = command.commands[word]
    for parameter in command.params:
        assert parameter.help, f"{parameter.name} has no help"
        assert "[" not in parameter.help, f"{parameter.name}: rich would swallow the bracket"
        longs = [option for option in parameter.opts if option.startswith("--")]
        assert parameter.param_type_name == "argument" or longs, f"{parameter.name} has no long option"


def test_command_runs_and_prints_to_stdout():
    done = _run(None, "--times", "3")
    assert (done.exit_code, done.stdout) == (0, "done 3\n")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("bad", "mend it"), 1),
        (IntegrityError("bad", "mend it"), 3),
        (UnsafeFileError("bad", "mend it"), 4),
        (LockedError("bad", "mend it"), 5),
        (InterruptedRun("bad", "mend it"), 75),
    ],
)
def test_reported_error_has_message_hint_and_its_code(error: Exception, code: int):
    done = _run(error)
    assert done.exit_code == code
    assert done.stdout == ""
    assert done.stderr == "error: bad\n\nhint: mend it\n"


def test_error_without_hint_is_one_line():
    assert _run(ConfigError("bad")).stderr == "error: bad\n"


def test_wrong_usage_exits_2():
    assert _run(None, "--times", "many").exit_code == 2
    assert _run(None, "--no-such-option").exit_code == 2


def test_keyboard_interrupt_exits_130():
    done = _run(KeyboardInterrupt())
    assert done.exit_code == 130
    assert done.stderr.startswith("error: interrupted\n")


def test_sigterm_is_told_and_exits_75():
    done = _run(Terminated())
    assert done.exit_code == 75
    assert (
        done.stderr
        == "error: stopped by SIGTERM\n\nhint: run the same command again: what it finished and kept is not done anew\n"
    )


def test_bug_exits_70_without_traceback():
    done = _run(ValueError("seven is not a colour"))
    assert done.exit_code == 70
    assert "internal error, please report: ValueError: seven is not a colour" in done.stderr
    assert "--debug" in done.stderr
    assert "Traceback" not in done.stderr


def test_debug_shows_the_traceback():
    done = _run(ConfigError("bad"), "--debug")
    assert done.exit_code == 1
    assert "Traceback" in done.stderr
    assert "error: bad\n" in done.stderr


@pytest.mark.parametrize("error", [MemoryError(), OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")])
def test_out_of_memory_exits_8(error: Exception):
    done = _run(error)
    assert done.exit_code == 8
    assert done.stderr.startswith("error: out of memory: ")
    assert "--batch-size" in done.stderr


def test_full_disk_and_closed_doors_are_plain_errors():
    full = _run(OSError(errno.ENOSPC, "No space left on device", "codes/train-00001.safetensors"))
    assert full.exit_code == 1
    assert full.stderr.startswith("error: the disk is full while writing `codes/train-00001.safetensors`\n")
    closed = _run(PermissionError(errno.EACCES, "Permission denied", "codes"))
    assert (closed.exit_code, closed.stderr.splitlines()[0]) == (1, "error: cannot use `codes`: Permission denied")


def test_foreign_text_reaches_the_screen_escaped():
    name = "[/x] [bold]\x1b[31m\r\x07\u202e\udcff"
    done = _run(ConfigError(f"unknown class `{name}`"))
    assert done.stderr == "error: unknown class `[/x] [bold]\\x1b[31m\\r\\x07\\u202e\\udcff`\n"


def test_reader_that_closes_the_pipe_hears_no_complaint():
    script = (
        "from varcli.cli import app\n"
        "import typer\n"
        "program = typer.Typer()\n"
        "@program.command()\n"
        "@app.guarded\n"
        "def act() -> None:\n"
        "    'Print a lot.'\n"
        "    for number in range(100_000): print(number)\n"
        "program()\n"
    )
    done = subprocess.run(
        f'"{sys.executable}" -c "$SCRIPT" | head -n 1',
        shell=True,
        cwd=ROOT,
        env={"SCRIPT": script, "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    assert (done.stdout, done.stderr) == ("0\n", "")


def test_module_and_script_are_the_same_program():
    done = subprocess.run([sys.executable, "-m", "varcli", "--version"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout.startswith("varcli ")


def test_unknown_command_exits_2_and_names_the_closest():
    done = CliRunner().invoke(app, ["sampel"])
    assert done.exit_code == 2
    assert "sample" in done.stderr


def test_json_goes_to_stdout_whole(capsys: pytest.CaptureFixture[str]):
    console.report({"folder": Path("codes"), "images": 3, "name": "\x1b"}, True, "unused")
    assert json.loads(capsys.readouterr().out) == {"folder": "codes", "images": 3, "name": "\x1b"}
