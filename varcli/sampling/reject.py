"""Rejection sampling: of every N candidates of a class the K that a classifier finds likeliest to be of it.

Candidates are images as ever, known by (seed, class, index). Candidates g N, ..., (g + 1) N - 1 of a class are a group, of
which K are kept, so more images asked for later leave the ones there as they are.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from varcli.artifacts.verify import read_json, read_json_lines
from varcli.artifacts.write import append_json_line, write_json
from varcli.errors import ArtifactError, ConfigError

SCORES_NAME = "scores.json"
_LOG = ".scores-{}.jsonl"  # of a process, until the folder is whole
_RATIO = re.compile(r"\s*(\d+)\s*/\s*(\d+)\s*")

Pair = tuple[int, int]  # class index, index within the class
Save = Callable[[Sequence[Pair], Tensor], None]


class Scores(Protocol):
    """What judges images; see `varcli.sampling.scorer.Scorer`."""

    def score(self, images_B3HW: Tensor, labels_B: Tensor) -> Tensor:
        """Return a number for each image, larger for a better one of its class."""


@dataclass(frozen=True)
class Rejection:
    """How many candidates are kept, and of how many."""

    keep: int
    of: int

    def __post_init__(self) -> None:
        if not 1 <= self.keep <= self.of:
            raise ConfigError(
                f"--reject keeps K of N candidates, with K from 1 to N, but is {self}", "e.g. 1/4: the best of four"
            )

    @classmethod
    def parse(cls, text: str) -> Rejection:
        """Read "K/N". Raises ConfigError for other text, or if K is not from 1 to N."""
        match = _RATIO.fullmatch(text)
        if match is None:
            raise ConfigError(f"--reject takes two whole numbers such as 1/4, but got `{text}`")
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.keep}/{self.of}"

    def groups(self, wanted: Sequence[Pair]) -> dict[Pair, list[int]]:
        """Return each (class, group) that images asked for come from, and their ranks in it; index is the i-th kept."""
        found: dict[Pair, list[int]] = {}
        for class_index, index in wanted:
            found.setdefault((class_index, index // self.keep), []).append(index % self.keep)
        return found

    def candidates(self, group: Pair) -> list[Pair]:
        """Return the (class, index) of all candidates of a group."""
        class_index, number = group
        return [(class_index, number * self.of + place) for place in range(self.of)]

    def winners(self, group: Pair, ranks: Sequence[int], scores: dict[Pair, float]) -> list[Pair]:
        """Return the candidates of these ranks, the best first; of equal ones the earlier."""
        ranked = sorted(self.candidates(group), key=lambda pair: (-scores[pair], pair))
        return [ranked[rank] for rank in sorted(ranks)]


class ScoreBook:
    """The scores of all candidates that were drawn into a folder, which processes write each for itself."""

    def __init__(self, folder: Path, rank: int) -> None:
        self.folder, self.path = Path(folder), Path(folder) / _LOG.format(rank)
        self.scores: dict[Pair, float] = {}
        self.scorer: dict[str, Any] | None = None  # what judged them, as `describe` told

    def read(self) -> None:
        """Read what all processes have written. Raises ArtifactError for a damaged file."""
        try:
            if (self.folder / SCORES_NAME).exists():
                stored = read_json(self.folder / SCORES_NAME)
                self.scorer = stored["scorer"]
                for class_index, entries in stored["scores"].items():
                    self.scores |= {(int(class_index), int(index)): float(score) for index, score in entries.items()}
            for path in sorted(self.folder.glob(_LOG.format("*"))):
                for record in read_json_lines(path):
                    self.scorer = record.get("scorer", self.scorer)
                    self.scores |= {(c, i): float(score) for c, i, score in record.get("scores", ())}
        except (KeyError, TypeError, ValueError, AttributeError):
            raise ArtifactError(
                f"the scores in `{self.folder}` are damaged", "delete that folder, or its scores"
            ) from None

    def describe(self, scorer: dict[str, Any]) -> None:
        """Note what judges."""
        self.scorer = scorer
        append_json_line(self.path, {"scorer": scorer})

    def add(self, pairs: Sequence[Pair], scores: Sequence[float]) -> None:
        """Note scores."""
        self.scores.update(zip(pairs, scores, strict=True))
        append_json_line(self.path, {"scores": [[*pair, score] for pair, score in zip(pairs, scores, strict=True)]})

    def finish(self) -> None:
        """Put all that was read into one file, for the manifest to name."""
        by_class: dict[str, dict[str, float]] = {}
        for (class_index, index), score in sorted(self.scores.items()):
            by_class.setdefault(str(class_index), {})[str(index)] = score
        write_json(self.folder / SCORES_NAME, {"scorer": self.scorer, "scores": by_class})
        for path in self.folder.glob(_LOG.format("*")):
            path.unlink()


class Judge:
    """Scores candidates as they are drawn, and saves those that win their group.

    groups: (class, group) and ranks wanted of it, as `Rejection.groups` returns. Images are kept until their group is
    whole; a winner that was drawn before and is not there any more is for the caller to draw again.
    """

    def __init__(
        self, rejection: Rejection, groups: dict[Pair, list[int]], scorer: Scores, book: ScoreBook, save: Save
    ) -> None:
        self.rejection, self.groups, self.scorer, self.book, self.save = rejection, groups, scorer, book, save
        self.held: dict[Pair, Tensor] = {}

    def missing(self) -> list[Pair]:
        """Return the candidates without a score, group by group."""
        return [
            pair for group in self.groups for pair in self.rejection.candidates(group) if pair not in self.book.scores
        ]

    def __call__(self, pairs: Sequence[Pair], images: Tensor) -> None:
        """Take images, uint8 (n, 3, H, W), of candidates in the order of `missing`."""
        scores = self.scorer.score(images, torch.tensor([class_index for class_index, _ in pairs]))
        self.held |= dict(zip(pairs, images, strict=True))
        self.book.add(pairs, scores.tolist())
        known, won = self.book.scores, list[Pair]()
        for group in dict.fromkeys((class_index, index // self.rejection.of) for class_index, index in pairs):
            candidates = self.rejection.candidates(group)
            if all(pair in known for pair in candidates):
                won += [pair for pair in self.rejection.winners(group, self.groups[group], known) if pair in self.held]
        if won:
            self.save(won, torch.stack([self.held[pair] for pair in won]))
        last = (pairs[-1][0], pairs[-1][1] // self.rejection.of)
        self.held = {
            pair: image for pair, image in self.held.items() if (pair[0], pair[1] // self.rejection.of) == last
        }
