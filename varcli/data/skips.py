"""Images that cannot be used: counted in one place, told in a line, and an error once they are many."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from varcli.data.paths import escape_path
from varcli.errors import SkipLimitError

if TYPE_CHECKING:
    from varcli.data.images import ImageTree


def allowed_skips(num_images: int, max_skip: int | None = None) -> int:
    """Return how many of `num_images` may be unusable: `max_skip`, or for None 100 or 0.1 %, whichever is more."""
    return max(100, num_images // 1000) if max_skip is None else max_skip


class Skips:
    """The unusable images of a tree, those that its listing left out among them.

    max_skip: as in `allowed_skips`. tell: takes lines for people; called by `tell` alone, in the caller's thread. Raises
    SkipLimitError if the listing left out more than allowed.
    """

    def __init__(self, tree: ImageTree, max_skip: int | None = None, tell: Callable[[str], None] | None = None) -> None:
        self.found: list[tuple[str, str]] = list(tree.skipped)  # (path, reason)
        self.allowed = allowed_skips(tree.num_images, max_skip)
        self._tell = tell
        self._told = len(self.found)  # the listing's are known to whoever opened it
        self.add(())  # they may be too many already

    def add(self, skipped: Iterable[tuple[str, str]]) -> None:
        """Note (path, reason) of further images. Raises SkipLimitError if they are more than allowed by now."""
        self.found.extend(skipped)
        if len(self.found) > self.allowed:
            path, reason = self.found[-1]
            raise SkipLimitError(
                f"{len(self.found):,} images cannot be used, but at most {self.allowed:,} may be skipped, e.g. "
                f"`{escape_path(path)}`: {reason}",
                "mend or remove them, or run again with a larger --max-skip: what was finished is kept",
            )

    def tell(self, what_of_them: str) -> None:
        """Say how many were added since the last call, with the last one's reason; nothing if there are none."""
        count = len(self.found) - self._told
        if not count or self._tell is None:
            return
        path, reason = self.found[-1]
        self._told = len(self.found)
        images = f"{count:,} images" if count > 1 else "an image"
        self._tell(f"warning: {images} cannot be used and {what_of_them}, e.g. `{escape_path(path)}`: {reason}")
