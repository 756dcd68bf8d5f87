"""A number out of an option's range is the same error in every command: what was expected, what came, code 1."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from typing import Annotated

import pytest
from typer import Argument, Option
from typer.models import ArgumentInfo
from typer.testing import CliRunner

from varcli.cli.app import COMMANDS, app
from varcli.cli.ranges import Range, check_ranges, take_ranges
from varcli.errors import ConfigError


def _signature(name: str) -> inspect.Signature:
    module, _, function = COMMANDS[name].target.partition(":")
    return inspect.signature(getattr(importlib.import_module(f"varcli.cli.{module}"), function), eval_str=True)


def _num_needed(name: str) -> int:
    """Arguments that a command cannot do without."""
    parameters = _signature(name).parameters.values()
    infos = [getattr(parameter.annotation, "__metadata__", [None])[0] for parameter in parameters]
    return sum(
        isinstance(info, ArgumentInfo) and parameter.default is parameter.empty
        for info, parameter in zip(infos, parameters, strict=True)
    )


LOW = [
    (name, allowed)
    for name in COMMANDS
    for allowed in take_ranges(_signature(name))[1].values()
    if allowed.low is not None
]


@pytest.mark.parametrize("name, allowed", LOW, ids=lambda value: value.option if isinstance(value, Range) else value)
def test_a_number_below_the_range_of_any_option_is_one_error(name, allowed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(
        app, [*name.split(), *["images"] * _num_needed(name), allowed.option, str(allowed.low - 1)]
    )
    assert done.exit_code == 1, done.output
    assert done.stderr.startswith(f"error: `{allowed.option}` must be {allowed}, but is {allowed.low - 1}")
    assert "hint: leave it out for its default" in done.stderr
    assert not list(tmp_path.iterdir())


def test_the_range_is_in_the_help():
    done = CliRunner().invoke(app, ["tokenize", "--help"], env={"COLUMNS": "200", "NO_COLOR": "1"})
    for shown in ("<int, 1 or more>", "<int, 0 to 256>", "<float, 0 to 1>"):
        assert shown in done.stdout


def _command(
    images: Annotated[Path, Argument(help="Images.")],
    share: Annotated[float, Option("--share", "-s", max=1, help="A share.")] = 0.5,
    sizes: Annotated[list[int] | None, Option("--size", min=1, max=8, help="Sizes.")] = None,
    name: Annotated[str, Option("--name", help="A name.")] = "a",
) -> None:
    """Stand for a command."""


def test_ranges_leave_the_rest_of_a_signature_as_it_is():
    before = inspect.signature(_command, eval_str=True)
    after, ranges = take_ranges(before)
    assert set(ranges) == {"share", "sizes"}
    assert [after.parameters[name] for name in ("images", "name")] == [
        before.parameters[name] for name in ("images", "name")
    ]
    assert after.parameters["sizes"].annotation.__metadata__[0].min is None
    assert before.parameters["sizes"].annotation.__metadata__[0].min == 1  # others may share it
    check_ranges(ranges, {"share": 1, "sizes": [1, 8], "name": "b"})
    check_ranges(ranges, {"share": -3.0, "sizes": None})


@pytest.mark.parametrize(
    "values, said",
    [
        ({"share": 1.5}, "`--share` must be 1 or less, but is 1.5"),
        ({"share": float("nan")}, "`--share` must be 1 or less, but is nan"),
        ({"sizes": [4, 9]}, "`--size` must be from 1 to 8, but is 9"),
    ],
)
def test_what_is_out_of_range_is_told_with_what_came(values, said):
    with pytest.raises(ConfigError, match=said):
        check_ranges(take_ranges(inspect.signature(_command, eval_str=True))[1], values)
