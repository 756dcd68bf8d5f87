"""Class names: from a folder's names to numbers and back; ImageNet's thousand names where nothing else is known."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from varcli.errors import DataError, unknown_name

NUM_IMAGENET = 1000
_WORDNET_ID = re.compile(r"n\d{8}")
_SHOWN = 12  # classes that fit into one hint


class ClassNames(Sequence[str]):
    """The names of a model's or dataset's classes, in the order of their numbers.

    A name may hold synonyms joined by ", " ("goldfinch, Carduelis carduelis"); each of them is understood. A thousand
    WordNet ids, which are the folder names of ImageNet, are understood by ImageNet's names too.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self.names = tuple(names)
        if not self.names:
            raise DataError("there are no classes")
        self._labels = self.names
        self.are_made_up = False  # whether they are numbers that stand for unknown names
        if len(self.names) == NUM_IMAGENET and all(_WORDNET_ID.fullmatch(name) for name in self.names):
            self._labels = imagenet_names()

    @classmethod
    def of(cls, names: Sequence[str] | None, num_classes: int) -> ClassNames:
        """Return the names given; without any, ImageNet's for 1000 classes, else the numbers as text."""
        if names:
            return cls(names)
        if num_classes == NUM_IMAGENET:
            return cls(imagenet_names())
        numbers = cls(map(str, range(num_classes)))
        numbers.are_made_up = True
        return numbers

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index):
        return self.names[index]

    def label(self, index: int) -> str:
        """Return what people call class `index`: its name, or for ImageNet folders ImageNet's name."""
        return self._labels[self._check(index)]

    def resolve(self, name: str | int) -> int:
        """Return the number of the class called `name`: a name, in any case, one of its synonyms, or a number.

        Raises DataError naming the closest for an unknown name, the choices for one that fits several classes, and the
        range for a number outside it.
        """
        if isinstance(name, int):
            return self._check(name)
        text = name.strip()
        folded = text.casefold()
        exact = [index for index, known in enumerate(self.names) if known == text]
        for matches in (
            exact,
            self._matching(lambda label: label.casefold() == folded),
            self._matching(lambda label: folded in [part.strip().casefold() for part in label.split(",")]),
        ):
            if len(matches) == 1:
                return matches[0]
            if matches:
                numbers = ", ".join(str(index) for index in matches)
                raise DataError(f"class name `{text}` fits several classes: {numbers}", "pass the number")
        if re.fullmatch(r"[+-]?\d+", text):
            if any(known.isdecimal() for known in self.names):
                raise unknown_name("class", text, self.names, DataError)  # here numbers are names: 3 may not mean "2"
            return self._check(int(text))
        raise unknown_name("class", text, set(self._labels), DataError)

    def _matching(self, test: Callable[[str], bool]) -> list[int]:
        found = {index for names in (self.names, self._labels) for index, label in enumerate(names) if test(label)}
        return sorted(found)

    def _check(self, index: int) -> int:
        if not 0 <= index < len(self.names):
            hint = "pass the name of a class"
            if len(self.names) <= _SHOWN:
                hint = ", ".join(f"{number} {name}" for number, name in enumerate(self._labels))
            last = len(self.names) - 1
            raise DataError(f"there is no class {index}: the {len(self.names)} classes are numbered 0 to {last}", hint)
        return index


def imagenet_names() -> tuple[str, ...]:
    """Return ImageNet-1k's class names in the order of its labels, from torchvision.

    Reads its list alone where that still lies where it lay: importing torchvision takes seconds.
    """
    try:
        file = Path(importlib.util.find_spec("torchvision").origin).parent / "models" / "_meta.py"
        spec = importlib.util.spec_from_file_location("_varcli_imagenet", file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        names = tuple(module._IMAGENET_CATEGORIES)
        if len(names) == NUM_IMAGENET:
            return names
    except (ImportError, AttributeError, OSError, SyntaxError, ValueError):  # a list that is private may move
        pass
    from torchvision.models import ResNet18_Weights

    return tuple(ResNet18_Weights.DEFAULT.meta["categories"])
