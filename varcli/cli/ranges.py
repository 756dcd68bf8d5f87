"""Numbers that an option may be: `min` and `max` of typer's Option, checked here for all commands in one way.

typer refuses a number out of range as a command line that does not parse, in words that leave out what came. It is a wrong
value like any other: ConfigError.
"""

from __future__ import annotations

import copy
import inspect
import os
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from typer.models import OptionInfo

from varcli.errors import ConfigError


@dataclass(frozen=True)
class Range:
    """What the numbers of one option may be, both ends included; None is no end."""

    option: str  # as people type it
    low: float | None
    high: float | None
    default: Any

    def __str__(self) -> str:
        if self.high is None:
            return f"{self.low} or more"
        return f"{self.high} or less" if self.low is None else f"from {self.low} to {self.high}"

    def check(self, value: Any) -> None:
        """Raise ConfigError if a value, or one of several, is out of range; None, an option not given, never is."""
        for number in value if isinstance(value, list | tuple) else [value]:
            if number is None:
                continue
            # said the other way round, so that "not a number" is out of range too
            if not ((self.low is None or number >= self.low) and (self.high is None or number <= self.high)):
                default = "" if self.default is None else f" of {self.default}"
                raise ConfigError(
                    f"`{self.option}` must be {self}, but is {number}", f"leave it out for its default{default}"
                )


def take_ranges(signature: inspect.Signature) -> tuple[inspect.Signature, dict[str, Range]]:
    """Take the ranges of its options from a command's signature, and name them in the help of what is left for typer.

    Returns that signature, and the ranges by the name of the parameter.
    """
    parameters, ranges = [], {}
    for name, parameter in signature.parameters.items():
        option = next((entry for entry in getattr(parameter.annotation, "__metadata__", ()) if _has_range(entry)), None)
        if option is not None:
            # typer takes the first word for the default of an option that is not in Annotated
            words = (option.default, *(option.param_decls or ()))
            shown = next(word for word in words if isinstance(word, str) and word.startswith("--"))
            ranges[name] = Range(shown, option.min, option.max, parameter.default)
            kind = parameter.annotation.__origin__
            free = copy.copy(option)
            free.min = free.max = None
            free.metavar = (
                option.metavar
                or f"<{'float' if _holds(kind, float) else 'int'}, {str(ranges[name]).removeprefix('from ')}>"
            )
            parameter = parameter.replace(annotation=Annotated[kind, free])
        parameters.append(parameter)
    return signature.replace(parameters=parameters), ranges


def check_ranges(ranges: Mapping[str, Range], values: Mapping[str, Any]) -> None:
    """Raise ConfigError at the first value out of its range; of torchrun's processes, which all got it, in one alone."""
    try:
        for name, allowed in ranges.items():
            allowed.check(values.get(name))
    except ConfigError:
        if os.environ.get("WORLD_SIZE", "1") == "1":
            raise
        from varcli.distributed import join_world

        with join_world("cpu"):
            raise


def _has_range(entry: object) -> bool:
    return isinstance(entry, OptionInfo) and (entry.min is not None or entry.max is not None)


def _holds(kind: Any, wanted: type) -> bool:
    """Say whether a type is `wanted`, or one of several or a list of it."""
    return kind is wanted or any(_holds(part, wanted) for part in typing.get_args(kind))
