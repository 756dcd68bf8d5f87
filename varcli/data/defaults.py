"""How images are decoded where the user says nothing: VAR's crops, or the whole image where it has the size already."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from varcli.data.decode import UnusableImage, load_image
from varcli.data.emoji import EMOJI64_CLASSES, EMOJI64_FLIP_CLASSES
from varcli.data.views import DecodeConfig

if TYPE_CHECKING:
    from varcli.data.images import ImageTree, Split

_NUM_PROBED = 16  # images looked at, spread over the first split


def default_decode(tree: ImageTree, size: int, views: int = 1, seed: int = 0) -> dict[str, DecodeConfig]:
    """Choose a DecodeConfig for each split of `tree`.

    Images that are `size` x `size` already are used whole: one view as it is, further ones turned, scaled and shifted a
    little. Others are cropped as VAR does (arXiv:2404.02905): at random for training, in the centre for "val".
    views: stored views of a training image. Grey IDX images are used whole, on black. emoji64 is mirrored by class.
    """
    train = next(iter(tree.splits))
    flips = EMOJI64_FLIP_CLASSES if tree.classes == EMOJI64_CLASSES else ()
    whole = _have_size(tree, tree.splits[train], size)
    fill = (255, 255, 255) if tree.splits[train].pixels is None else (0, 0, 0)
    configs = {}
    for name in tree.splits:
        if whole:
            augment = "shift" if name == train and views > 1 else "none"
            crop = "none"
        else:
            augment, crop = "none", "random" if name == train and name != "val" else "center"
        flipped = flips if augment == "shift" or crop == "random" else ()
        configs[name] = DecodeConfig(size=size, crop=crop, augment=augment, flip_classes=flipped, fill=fill, seed=seed)
    return configs


def _have_size(tree: ImageTree, split: Split, size: int) -> bool:
    if split.pixels is not None:
        return True
    sizes = set()
    for index in np.linspace(0, len(split) - 1, min(_NUM_PROBED, len(split))).astype(int):
        try:
            sizes.add(load_image(tree.root / split.paths[index])[0].size)
        except UnusableImage:
            continue  # reported when all are read
    return sizes == {(size, size)}
