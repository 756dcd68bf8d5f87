"""One image file of any kind, as RGB: what is converted, and what is refused and why.

Formats are told by content from a closed list, since some that Pillow knows start other programs. Orientation in EXIF
is ignored but for TIFF, as in the usual ImageNet pipeline, and noted.
"""

from __future__ import annotations

import os
import re
import stat
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
SUFFIXES = frozenset({".jpg", ".jpeg", ".jpe", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"})
MAX_PIXELS = 64 * 10**6  # of one image, declared or after the resize

_ORIENTATION = 0x0112  # EXIF's tag: 1 as stored, 2 to 8 turned or mirrored
_SIXTEEN_BIT = ("I;16", "I;16L", "I;16B", "I;16N")
_KINDS = {"L": "grey", "1": "1-bit", "P": "palette", "CMYK": "CMYK", "YCbCr": "YCbCr", "LA": "grey", "PA": "palette"}
_MARKER = re.compile(rb"\xff([^\x00\xd0-\xd7\xff])")  # a JPEG marker that is neither a stuffed byte nor a restart


class UnusableImage(Exception):
    """An image that is skipped; the text is the reason, without the path. Never leaves varcli.data as such."""


def load_image(
    path: Path, max_pixels: int = MAX_PIXELS, enough: Callable[[tuple[int, int]], tuple[int, int]] | None = None
) -> tuple[Image.Image, list[str]]:
    """Read one image file.

    enough: told the (width, height) of a JPEG, says how much of it is enough: it is decoded at an eighth, a quarter or half
    of its size, if neither side becomes shorter than that. None decodes everything.
    Returns an RGB image and notes on what was converted, e.g. ["alpha over white"]; no notes for plain 8-bit RGB.
    Raises UnusableImage with the reason if the file is no image, damaged, too large, or not a regular file.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except OSError as error:
        raise UnusableImage(f"cannot be read: {error.strerror}") from None
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):  # opened without blocking, so that a FIFO gets here
        os.close(descriptor)
        raise UnusableImage("not a regular file")
    with os.fdopen(descriptor, "rb") as file:
        if status.st_size == 0:
            raise UnusableImage("empty file")
        # damaged metadata warns once an image; a flood of warnings would hide everything else
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            try:
                image, notes = _decode(file, max_pixels, enough)
            except UnusableImage:
                raise
            except Image.UnidentifiedImageError:
                raise UnusableImage(f"not an image of a known format ({', '.join(FORMATS)})") from None
            except (Image.DecompressionBombError, Image.DecompressionBombWarning):
                raise UnusableImage(f"more than {max_pixels} pixels") from None
            except Exception as error:  # noqa: BLE001 - Pillow raises nearly any type on hostile bytes
                text = " ".join(str(error).split())[:120]
                raise UnusableImage(f"damaged: {text or type(error).__name__}") from None
    return image, notes + (["damaged metadata"] if caught else [])


def to_rgb(image: Image.Image) -> tuple[Image.Image, list[str]]:
    """Convert a loaded image of any mode to RGB: 16 bit is scaled, transparency is laid over white."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image, []
    if image.mode in _SIXTEEN_BIT or (image.mode == "I" and image.format == "PNG"):
        values = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB"), ["16-bit"]
    kinds = [_KINDS[image.mode]] if image.mode in _KINDS else []
    if image.mode in ("RGBA", "LA", "PA", "RGBa") or "transparency" in image.info:
        drawing = image.convert("RGBA")
        canvas = Image.new("RGBA", drawing.size, "white")
        canvas.alpha_composite(drawing)
        return canvas.convert("RGB"), [*kinds, "alpha over white"]
    if image.mode not in _KINDS:
        raise UnusableImage(f"colour mode {image.mode} has no set range")
    return image.convert("RGB"), kinds


def _decode(
    file: IO[bytes], max_pixels: int, enough: Callable[[tuple[int, int]], tuple[int, int]] | None
) -> tuple[Image.Image, list[str]]:
    image = Image.open(file, formats=FORMATS)
    width, height = image.size
    if width * height > max_pixels:
        raise UnusableImage(f"{width} x {height} is more than {max_pixels} pixels")
    if image.format == "JPEG" and not _jpeg_is_whole(file):
        raise UnusableImage("truncated")
    notes = ["first of several frames"] if getattr(image, "n_frames", 1) > 1 else []
    if image.mode not in _SIXTEEN_BIT and any(";16" in str(tile[3]) for tile in image.tile):
        notes.append("16-bit")  # colour: Pillow keeps the upper byte, which is the scaling wanted here
    image.seek(0)
    if image.format == "JPEG" and enough is not None:
        image.draft(None, enough(image.size))
    image.load()
    if _is_turned(image):
        notes.append("orientation ignored")
    rgb, kinds = to_rgb(image)
    return rgb, kinds + notes


def _is_turned(image: Image.Image) -> bool:
    """Say whether EXIF asks viewers to turn or mirror a loaded image, as a TIFF's, which Pillow turns, does no longer."""
    if not any(name in image.info for name in ("exif", "Raw profile type exif")):
        return False
    try:
        return image.getexif().get(_ORIENTATION, 1) not in (0, 1)
    except Exception:  # noqa: BLE001 - Pillow raises nearly any type on hostile bytes, and the pixels are good
        return False


def _jpeg_is_whole(file: IO[bytes]) -> bool:
    """Say whether a JPEG has its end marker: libjpeg fills what is missing with grey and only warns."""
    position = file.tell()
    file.seek(0)
    data = file.read()
    file.seek(position)
    at = 2
    while match := _MARKER.search(data, at):
        marker = match[1][0]
        if marker == 0xD9:
            return True
        # every other marker but SOI has a length; after SOS come the coded bytes, in which the search goes on
        at = (
            match.end()
            if marker in (0xD8, 0x01)
            else match.end() + int.from_bytes(data[match.end() : match.end() + 2], "big")
        )
    return False
