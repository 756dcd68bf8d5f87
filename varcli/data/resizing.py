"""A square of a resized image without resizing the rest: the pixels that Pillow's own resize gives, in half the time."""

from __future__ import annotations

import math

from PIL import Image

_LANCZOS = Image.Resampling.LANCZOS
_REACH = 3  # source pixels on either side that Lanczos weighs, times the factor by which an image shrinks
_TALL = 1.8  # height over width; from about 2 on Pillow may resize the columns first, which rounds differently


def resize_part(image: Image.Image, target: tuple[int, int], corner: tuple[int, int], size: int) -> Image.Image:
    """Return the square of `size` pixels at `corner` of `image` resized to `target` with Lanczos, and nothing else of it.

    Every pixel is the one of `image.resize(target)`: first the rows are resized, as Pillow does, then the columns, each
    only where the square needs it.
    """
    (width, height), (left, top) = image.size, corner
    if image.size == target or height > _TALL * width:
        return image.resize(target, _LANCZOS).crop((left, top, left + size, top + size))
    reach = math.ceil(_REACH * max(1.0, height / target[1])) + 1
    above, below = exact_span(top, size, height, target[1])
    start, stop = above * height / target[1], below * height / target[1]
    first, last = max(0, math.floor(start) - reach), min(height, math.ceil(stop) + reach)
    before, after = exact_span(left, size, width, target[0])
    rows = image.crop((0, first, width, last))
    box = (before * width / target[0], 0, after * width / target[0], last - first)
    rows = rows.resize((after - before, last - first), _LANCZOS, box=box)
    rows = rows.crop((left - before, 0, left - before + size, last - first))
    square = rows.resize((size, below - above), _LANCZOS, box=(0, start - first, size, stop - first))
    return square.crop((0, top - above, size, top - above + size))


def exact_span(first: int, size: int, side: int, target: int) -> tuple[int, int]:
    """Return the start and end of the pixels, of `target` along an axis, from which [first, first + size) is cut.

    Pillow takes the box to resize in single precision, and a box that was rounded moves pixels by a hair and some of them
    by a grey level. So the box's edges are put where position * side / target has no more than 24 binary digits: at
    multiples of the odd part of the denominator.
    """
    step = target // math.gcd(side, target)
    step //= step & -step
    return first // step * step, -(-(first + size) // step) * step
