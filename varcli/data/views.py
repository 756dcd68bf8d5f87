"""From a decoded image to the square the tokenizer reads: resize, crop, and small changes that keep the class.

Each view is a pure function of (seed, image path, view number), so neither workers nor batches nor restarts change it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from PIL import Image

from varcli.config import to_dict
from varcli.data.decode import MAX_PIXELS, UnusableImage
from varcli.data.resizing import resize_part
from varcli.errors import ConfigError

_YIQ = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])  # luma and chroma of NTSC
_POWER_SATURATION = np.array([0.35, 0.5])  # largest logarithm of the power on brightness and of the factor on colours
_MAX_HUE = 0.1  # turns
_ENOUGH = 2  # times the target, the least that a JPEG is reduced to
_OVERSAMPLE = 3  # small images are turned and shifted at this multiple, so that they stay sharp


@dataclass(frozen=True, kw_only=True)
class DecodeConfig:
    """How images become squares of `size` pixels.

    crop "center" and "random" follow VAR (arXiv:2404.02905): the shorter edge is resized to round(resize_ratio * size)
    with Lanczos, then a square is cut. "none" cuts nothing away: the longer edge is resized to `size` (not at all where
    it has that length) and the rest is filled. "exact" takes images of that size only, as they are.
    """

    size: int  # pixels, side of the result
    crop: Literal["center", "random", "none", "exact"] = "center"
    resize_ratio: float = 1.125  # shorter edge before the crop, as a multiple of size
    augment: Literal["none", "shift"] = "none"  # "shift" turns, scales and moves view 1, 2, ...; needs crop "none"
    max_rotation: float = 8.0  # degrees to either side, for "shift"
    max_scaling: float = 0.1  # fraction to either side, for "shift"
    max_shift: float = 0.06  # fraction of size to each side, for "shift"
    colour: float = 0.0  # strength of changes of hue, saturation and brightness of view 1, 2, ...; 0 is off, 1 strong
    flip_classes: tuple[str, ...] = ()  # classes of which every second view is mirrored, the unaugmented one not
    fill: tuple[int, ...] = (255, 255, 255)  # RGB around an image that does not fill the square
    seed: int = 0  # of every random choice
    max_pixels: int = MAX_PIXELS  # larger images, before or after the resize, are skipped
    reduced: bool = False  # decode a JPEG at 1/2, 1/4 or 1/8 where that is still twice what the resize makes of it

    def __post_init__(self) -> None:
        if self.size < 1 or self.resize_ratio < 1:
            raise ConfigError(f"size must be >= 1 and resize_ratio >= 1, but they are {self.size}, {self.resize_ratio}")
        if self.augment == "shift" and self.crop != "none":
            raise ConfigError(f"augment `shift` needs crop `none`, but crop is `{self.crop}`")
        if self.augment not in ("none", "shift") or self.crop not in ("center", "random", "none", "exact"):
            raise ConfigError(
                f"crop is center, random, none or exact and augment none or shift: {self.crop}, {self.augment}"
            )
        if len(self.fill) != 3 or not all(0 <= value <= 255 for value in self.fill):
            raise ConfigError(f"fill must be three values in [0, 255], but is {self.fill}")
        if not (0 <= self.max_scaling < 1 and 0 <= self.max_shift < 1 and 0 <= self.max_rotation <= 180):
            raise ConfigError("max_scaling and max_shift must be in [0, 1), max_rotation in [0, 180]")
        if not 0 <= self.colour <= 1:
            raise ConfigError(f"colour must be from 0 to 1, but is {self.colour}", "0 leaves colours alone")

    def describe(self) -> dict[str, Any]:
        """Plain values of everything that decides the pixels; `reduced`, which is younger than caches, only where it is on."""
        return {name: value for name, value in to_dict(self).items() if name != "reduced" or value}

    def enough(self, full_size: tuple[int, int]) -> tuple[int, int]:
        """Return the (width, height) that a JPEG of `full_size` must keep for `reduced`.

        With twice the target, the pixels of squares of 256 differ by 2 grey levels at most, by 0.3 on average (53 dB), from
        those of the whole JPEG, measured on made-up photographs of 1600 x 1200 to 4000 x 3000.
        """
        if self.crop == "exact":
            return full_size
        width, height = _resized(full_size, self)
        return _ENOUGH * width, _ENOUGH * height


def prepare(image: Image.Image, config: DecodeConfig, full_size: tuple[int, int] | None = None) -> Image.Image:
    """Do the part that all views of an RGB image share: the resize, and for crop "none" the padding.

    full_size: (width, height) of an image that was decoded smaller; the result has the size it would have had.
    Raises UnusableImage if the result would be larger than max_pixels (a very long, thin image).
    """
    if config.crop == "exact":
        if image.size != (config.size, config.size):
            raise UnusableImage(
                f"is {image.width} x {image.height} pixels, but the others are {config.size} x {config.size}"
            )
        return image
    if config.crop == "none":
        target = _resized(full_size or image.size, config)
        image = _resize(image, target, config, full_size)
        if target == (config.size, config.size):
            return image
        square = Image.new("RGB", (config.size, config.size), config.fill)
        square.paste(image, ((config.size - target[0]) // 2, (config.size - target[1]) // 2))
        return square
    return _resize(image, _resized(full_size or image.size, config), config, full_size)


def cut_view(prepared: Image.Image, config: DecodeConfig, path: str, view: int, flip: bool) -> np.ndarray:
    """Make one view of an image that went through `prepare`.

    flip: whether its class is one of flip_classes. Returns uint8 (3, size, size).
    """
    random = _generator(config.seed, path, view)
    if config.crop == "none" and config.augment == "shift" and view > 0:
        prepared = _shift(prepared, config, random)
    elif config.crop in ("center", "random"):
        left, top = _corner(prepared.size, config, random)
        prepared = prepared.crop((left, top, left + config.size, top + config.size))
    return _finish(prepared, config, view, flip, random)


def cut_views(
    image: Image.Image,
    config: DecodeConfig,
    path: str,
    views: Sequence[int],
    flip: bool,
    full_size: tuple[int, int] | None = None,
) -> list[np.ndarray]:
    """Make views of an RGB image: what `prepare` and `cut_view` give, and sooner where one is cut from a larger picture.

    Raises UnusableImage as `prepare`.
    """
    if len(views) == 1 and config.crop in ("center", "random"):
        target = _resized(full_size or image.size, config)
        _require_resizable(image, target, config)
        random = _generator(config.seed, path, views[0])
        corner = _corner(target, config, random)
        if full_size in (None, image.size):
            part = resize_part(image, target, corner, config.size)
        else:
            across, down = (extent / side for extent, side in zip(_extent(image, full_size), target, strict=True))
            left, top = corner
            box = (left * across, top * down, (left + config.size) * across, (top + config.size) * down)
            part = image.resize((config.size, config.size), Image.Resampling.LANCZOS, box)
        return [_finish(part, config, views[0], flip, random)]
    prepared = prepare(image, config, full_size)
    return [cut_view(prepared, config, path, view, flip) for view in views]


def _resized(size: tuple[int, int], config: DecodeConfig) -> tuple[int, int]:
    """Width and height of an image before it is cropped or padded."""
    width, height = size
    if config.crop == "none":
        scale = config.size / max(width, height)
        return max(1, round(width * scale)), max(1, round(height * scale))
    short = round(config.resize_ratio * config.size)
    # the longer edge is cut to a whole number, not rounded: as torchvision's Resize, which VAR uses
    if width <= height:
        return short, int(short * height / width)
    return int(short * width / height), short


def _corner(resized: tuple[int, int], config: DecodeConfig, random: np.random.Generator) -> tuple[int, int]:
    """Left and top of the square that is cut."""
    left, top = (side - config.size for side in resized)
    if config.crop == "center":
        return round(left / 2), round(top / 2)  # rounded half to even, as torchvision's CenterCrop
    return int(random.integers(left + 1)), int(random.integers(top + 1))


def _finish(
    prepared: Image.Image, config: DecodeConfig, view: int, flip: bool, random: np.random.Generator
) -> np.ndarray:
    """Mirror and recolour a square, and turn it into uint8 (3, size, size)."""
    is_plain = view == 0 and config.crop != "random"
    if flip and not is_plain and random.random() < 0.5:
        prepared = prepared.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    pixels = np.asarray(prepared)
    if config.colour and view > 0:
        pixels = _recolour(pixels, config.colour, random)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _resize(
    image: Image.Image, target: tuple[int, int], config: DecodeConfig, full_size: tuple[int, int] | None = None
) -> Image.Image:
    if image.size == target:
        return image
    _require_resizable(image, target, config)
    return image.resize(target, Image.Resampling.LANCZOS, (0, 0, *_extent(image, full_size or image.size)))


def _extent(image: Image.Image, full_size: tuple[int, int]) -> tuple[float, float]:
    """Where the picture ends in an image that was decoded smaller: its last column and row stand for less than the others."""
    factor = 2 ** round(math.log2(max(full_size) / max(image.size)))
    return full_size[0] / factor, full_size[1] / factor


def _require_resizable(image: Image.Image, target: tuple[int, int], config: DecodeConfig) -> None:
    if image.size != target and target[0] * target[1] > config.max_pixels:
        raise UnusableImage(f"{image.width} x {image.height} is too long and thin to resize")


def _shift(image: Image.Image, config: DecodeConfig, random: np.random.Generator) -> Image.Image:
    """Turn, scale and move a square image a little; what comes in from outside is `fill`."""
    angle = np.deg2rad(random.uniform(-config.max_rotation, config.max_rotation))
    scale = 1 + random.uniform(-config.max_scaling, config.max_scaling)
    shift = random.uniform(-config.max_shift, config.max_shift, 2) * config.size
    side = config.size * _OVERSAMPLE
    cosine, sine = np.cos(angle) / scale, np.sin(angle) / scale
    middle = side / 2
    # PIL asks where each output pixel comes from: the inverse map, turned about the middle
    offset_x = middle - cosine * (middle + shift[0] * _OVERSAMPLE) - sine * (middle + shift[1] * _OVERSAMPLE)
    offset_y = middle + sine * (middle + shift[0] * _OVERSAMPLE) - cosine * (middle + shift[1] * _OVERSAMPLE)
    large = image.resize((side, side), Image.Resampling.LANCZOS).transform(
        (side, side),
        Image.Transform.AFFINE,
        (cosine, sine, offset_x, -sine, cosine, offset_y),
        Image.Resampling.BICUBIC,
        fillcolor=config.fill,
    )
    return large.resize((config.size, config.size), Image.Resampling.LANCZOS)


def _recolour(pixels: np.ndarray, strength: float, random: np.random.Generator) -> np.ndarray:
    """Change brightness by a power, then turn and stretch the colours about the grey axis: black and white stay.

    pixels: uint8 (H, W, 3), which the result is too.
    """
    power, saturation = np.exp(strength * random.uniform(-1, 1, 2) * _POWER_SATURATION)
    angle = 2 * np.pi * strength * random.uniform(-_MAX_HUE, _MAX_HUE)
    cosine, sine = saturation * np.cos(angle), saturation * np.sin(angle)
    turn = np.array([[1, 0, 0], [0, cosine, -sine], [0, sine, cosine]])
    change = np.linalg.inv(_YIQ) @ turn @ _YIQ
    bright = (pixels / 255.0) ** power
    return np.clip(bright @ change.T * 255 + 0.5, 0, 255).astype(np.uint8)


def _generator(seed: int, path: str, view: int) -> np.random.Generator:
    name = f"{seed}|{view}|".encode() + path.encode("utf-8", "surrogateescape")
    key = np.frombuffer(hashlib.blake2b(name, digest_size=16).digest(), np.uint64)
    return np.random.Generator(np.random.Philox(key=key))
