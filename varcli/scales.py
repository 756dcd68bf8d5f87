"""Schedules of scales: the sides of an image's token maps, coarse to fine."""

from __future__ import annotations

from dataclasses import dataclass

from varcli.errors import ConfigError

NAMED_SCHEDULES: dict[str, tuple[int, ...]] = {
    "256": (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
    "512": (1, 2, 3, 4, 6, 9, 13, 18, 24, 32),
    "1024": (1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64),
}
"""Schedules of the VAR paper by image side at downsampling factor 16 (arXiv:2404.02905, released code)."""

_LONGEST = 256  # 4,096 px at a downsampling of 16: more is a mistake or malice, and would take all memory
_GROWING = (*NAMED_SCHEDULES["256"], 20, 25, 32, 40, 50, 64)  # each side about a quarter longer than the one before


@dataclass(frozen=True)
class PatchNums:
    """The sides of K square token maps, coarse to fine; the last one is the latent grid's side.

    Raises ConfigError if `sides` is empty, holds a side below 1, or gets smaller.
    """

    sides: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "sides", tuple(int(side) for side in self.sides))
        if not self.sides or min(self.sides) < 1:
            raise ConfigError(f"patch_nums must be sides of at least 1, but is {self.sides}", "e.g. 1,2,3,4,6,8")
        if max(self.sides) > _LONGEST or len(self.sides) > _LONGEST:
            raise ConfigError(f"patch_nums are at most {_LONGEST} sides of at most {_LONGEST}", "e.g. 1,2,3,4,6,8")
        if any(later < earlier for earlier, later in zip(self.sides, self.sides[1:], strict=False)):
            raise ConfigError(f"patch_nums must go from coarse to fine, but is {self.sides}", "sort the sides")

    @classmethod
    def parse(cls, text: str) -> PatchNums:
        """Read "1,2,3,4" or the name of a schedule ("256", "512", "1024")."""
        if text.strip() in NAMED_SCHEDULES:
            return cls(NAMED_SCHEDULES[text.strip()])
        try:
            return cls(tuple(int(part) for part in text.replace("_", ",").split(",")))
        except ValueError:
            names = ", ".join(NAMED_SCHEDULES)
            raise ConfigError(
                f"patch_nums must be whole numbers joined by commas, but is `{text}`", f"or one of: {names}"
            ) from None

    @classmethod
    def up_to(cls, grid_side: int) -> PatchNums:
        """Return a schedule that ends at a grid of `grid_side`: the paper's if there is one, else each a quarter larger."""
        for sides in NAMED_SCHEDULES.values():
            if sides[-1] == grid_side:
                return cls(sides)
        return cls((*(side for side in _GROWING if side < grid_side), grid_side))

    @property
    def num_scales(self) -> int:
        """K."""
        return len(self.sides)

    @property
    def grid_side(self) -> int:
        """Side of the finest map, which is the side of the latent grid."""
        return self.sides[-1]

    @property
    def step_lengths(self) -> tuple[int, ...]:
        """Tokens of each scale."""
        return tuple(side * side for side in self.sides)

    @property
    def seq_len(self) -> int:
        """L, the tokens of all scales."""
        return sum(self.step_lengths)

    def __iter__(self):
        return iter(self.sides)

    def __str__(self) -> str:
        return ",".join(str(side) for side in self.sides)
