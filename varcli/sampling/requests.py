"""Which images are asked for: classes by name or number, and which image of its class each is."""

from __future__ import annotations

import itertools
import operator
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from varcli.data.classes import ClassNames
from varcli.errors import ConfigError


def number_images(
    classes: Sequence[int | str], indices: Sequence[int] | None, names: ClassNames
) -> tuple[list[int], list[int]]:
    """Return the class number of each image asked for, and which image of its class it is.

    classes: names or numbers; the number of classes itself stands for "no class". indices: None counts up within each class.
    Raises DataError for an unknown class, ConfigError for an empty list or what is no list of classes or indices.
    """
    if isinstance(classes, str) or not isinstance(classes, Iterable):
        raise ConfigError(f"classes must be a list of names or numbers, but is `{classes}`", f"e.g. [{classes!r}] * 4")
    numbers = [_resolve(entry, names) for entry in classes]
    if not numbers:
        raise ConfigError("there is nothing to sample", "ask for at least one image")
    if indices is None:
        counters: dict[int, itertools.count] = defaultdict(itertools.count)
        indices = [next(counters[number]) for number in numbers]
    if len(indices) != len(numbers):
        raise ConfigError(f"there are {len(numbers)} classes, but {len(indices)} indices", "pass one for each")
    return numbers, [_index(entry) for entry in indices]


def _resolve(entry: int | str, names: ClassNames) -> int:
    if not isinstance(entry, str):
        if isinstance(entry, bool) or not hasattr(entry, "__index__"):
            raise ConfigError(f"a class is a name or a whole number, but got {entry!r}")
        entry = operator.index(entry)  # numpy's and torch's whole numbers, too
    no_class = len(names)
    return no_class if entry == no_class else names.resolve(entry)


def _index(entry: Any) -> int:
    if isinstance(entry, bool) or not hasattr(entry, "__index__"):
        raise ConfigError(f"an index is a whole number, but got {entry!r}")
    try:
        index = operator.index(entry)
    except TypeError:  # a tensor of floats has the method
        raise ConfigError(f"an index is a whole number, but got {entry!r}") from None
    if index < 0:
        raise ConfigError(f"an index is 0 or more, but got {index}")
    return index
