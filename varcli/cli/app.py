"""The `varcli` program: the table of commands, and the one place where errors become messages and exit codes.

To add a command, write one file with one function and add its line to COMMANDS:

    # cli/resize.py
    def resize(images: Annotated[Path, Argument(help="Image folder.")], out: OutOption, json: JsonOption = False) -> None:
        \"\"\"Write a folder of images at another size.\"\"\"
        from varcli.data.resize import resize_folder  # heavy imports stay inside, so --help is quick

        done = resize_folder(images, out, on_step=console.progress("resizing"))
        console.report({"folder": str(out), "images": done.num_images}, json, f"{done.num_images} images in {out}")

    # here
    "resize": Command("resize:resize", "Data"),

The docstring is the command's help; it and the options' help hold no square brackets, which rich would swallow. Whatever
the function raises becomes a message and an exit code in `guarded`: a command prints no errors and never exits by itself.
Every command also takes `--debug`.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import importlib
import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import typer

from varcli import __version__
from varcli.cli import console
from varcli.cli.ranges import check_ranges, take_ranges
from varcli.errors import VarcliError, is_out_of_memory

INTERNAL_ERROR, OUT_OF_MEMORY = 70, 8


class Command(NamedTuple):
    """Where a command's function is (`module:function`, below varcli.cli) and the panel it is listed in.

    A name of two words is a command of a group, e.g. "reference build".
    """

    target: str
    group: str


COMMANDS = {
    "demo": Command("demo:demo", "Start here"),
    "data": Command("data:data", "The pipeline"),
    "tokenize": Command("tokenize:tokenize", "The pipeline"),
    "train": Command("train:train", "The pipeline"),
    "sample": Command("sample:sample", "The pipeline"),
    "eval": Command("eval:evaluate", "The pipeline"),
    "train-tokenizer": Command("train_tokenizer:train_tokenizer", "Models"),
    "pull": Command("pull:pull", "Models"),
    "import": Command("import_:import_", "Models"),
    "export": Command("export:export", "Models"),
    "info": Command("info:info", "Models"),
    "sweep": Command("sweep:sweep", "Measure"),
    "reference build": Command("reference:build", "Measure"),
    "runs": Command("runs:runs", "Measure"),
    "curves": Command("curves:curves", "Measure"),
    "bench": Command("bench:bench", "Measure"),
}


def guarded(command: Callable[..., None]) -> Callable[..., None]:
    """Wrap a command so that its errors become `error: ...` and `hint: ...` on stderr and an exit code.

    VarcliError exits with its own code; a full disk or an unreadable file with 1; no memory with 8; Ctrl-C with 130, SIGTERM
    with 75; a reader that closed the pipe with 1 and no word; anything else, which is a bug, with 70. `--debug`
    shows the traceback.
    """
    signature, ranges = take_ranges(inspect.signature(command, eval_str=True))
    option = typer.Option("--debug", help="Show where in the code an error came from.", show_default=False)
    debug_option = inspect.Parameter(
        "debug", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Annotated[bool, option]
    )

    @functools.wraps(command)
    def run(*arguments: Any, debug: bool = False, **options: Any) -> None:
        try:
            check_ranges(ranges, options)
            command(*arguments, **options)
            console.close_progress()
            sys.stdout.flush()
        except (typer.Exit, typer.Abort):
            raise
        except BrokenPipeError:
            _discard_output()
            raise typer.Exit(1) from None
        except BaseException as error:  # the last stop of every error
            if isinstance(error, SystemExit | GeneratorExit):
                raise
            if debug:
                console.note(traceback.format_exc())
            code = report_error(error)
            raise typer.Exit(code) from None

    parameters = [*signature.parameters.values(), debug_option]
    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return run


def report_error(error: BaseException) -> int:
    """Print `error` for people and return the exit code that belongs to it."""
    if isinstance(error, VarcliError):
        console.error(str(error), error.hint)
        return error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return console.interrupted(error)
    if is_out_of_memory(error):
        console.error(
            f"out of memory: {str(error).splitlines()[0] if str(error) else 'the machine has no more'}",
            "use a smaller --batch-size, or --precision bf16 on a GPU",
        )
        return OUT_OF_MEMORY
    if isinstance(error, OSError):
        console.error(*_describe_os_error(error))
        return 1
    console.error(
        f"internal error, please report: {type(error).__name__}: {error}",
        "run it again with --debug and send the traceback with the command",
    )
    return INTERNAL_ERROR


def _describe_os_error(error: OSError) -> tuple[str, str | None]:
    where = f" `{os.fsdecode(error.filename)}`" if isinstance(error.filename, str | bytes | os.PathLike) else ""
    reason = error.strerror or str(error) or type(error).__name__
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return (
            f"the disk is full while writing{where}",
            "free some space and run the same command again: what was finished is kept",
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"cannot use{where}: {reason}", "change its permissions, or choose another path"
    return f"cannot use{where}: {reason}", None


def _discard_output() -> None:
    """Point stdout at nothing, so that the interpreter's last flush does not complain about the closed pipe."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _show_version(wanted: bool) -> None:
    if wanted:
        console.result(f"varcli {__version__}")
        raise typer.Exit


app = typer.Typer(
    name="varcli",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["--help", "-h"]},
)


@app.callback()
def _program(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Train, sample and evaluate visual autoregressive models (next-scale prediction)."""


GROUPS = {"reference": "Make the files that samples are measured against."}
"""Groups of commands, and what they are for."""

_groups: dict[str, typer.Typer] = {"": app}
for _name, _entry in COMMANDS.items():
    _module, _, _function = _entry.target.partition(":")
    if importlib.util.find_spec(f"varcli.cli.{_module}") is None:
        continue
    _command = getattr(importlib.import_module(f"varcli.cli.{_module}"), _function)
    _group, _, _word = _name.rpartition(" ")
    if _group not in _groups:
        _groups[_group] = typer.Typer(no_args_is_help=True)
        app.add_typer(_groups[_group], name=_group, help=GROUPS[_group], rich_help_panel=_entry.group)
    _groups[_group].command(_word, rich_help_panel=_entry.group)(guarded(_command))


def main() -> None:
    """Run the program on the process's arguments; `varcli.__main__` calls it."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a name that the terminal cannot show is no reason to stop
    try:
        app(prog_name="varcli")
    except SystemExit as ended:
        stopped_by = getattr(ended.__context__, "__cause__", None)
        if isinstance(stopped_by, KeyboardInterrupt):  # outside of a command, where typer makes a bare code 130 of it
            raise stopped_by from None
        raise
