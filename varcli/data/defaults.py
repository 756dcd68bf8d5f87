"""How images are decoded where the user says nothing: VAR's crops, or the whole image where it has the size already."""

from __future__ import annotations

from varcli.data.emoji import EMOJI64_CLASSES, EMOJI64_FLIP_CLASSES
from varcli.data.images import ImageTree, probe_sizes
from varcli.data.views import DecodeConfig


def default_decode(
    tree: ImageTree, size: int, views: int = 1, seed: int = 0, colour: float = 0.0, reduced: bool = False
) -> dict[str, DecodeConfig]:
    """Choose a DecodeConfig for each split of `tree`.

    Images that are `size` x `size` already are used whole: one view as it is, further ones turned, scaled and shifted a
    little. Others are cropped as VAR does (arXiv:2404.02905): at random for training, in the centre for "val".
    views: stored views of a training image. colour: strength of the colour changes of its further views. Grey IDX images
    are used whole, on black. emoji64 is mirrored by class. reduced: as in `DecodeConfig`.
    """
    train = next(iter(tree.splits))
    flips = EMOJI64_FLIP_CLASSES if tree.classes == EMOJI64_CLASSES else ()
    split = tree.splits[train]
    whole = split.pixels is not None or set(probe_sizes(tree.root, split)) == {(size, size)}
    fill = (255, 255, 255) if split.pixels is None else (0, 0, 0)
    configs = {}
    for name in tree.splits:
        if whole:
            augment = "shift" if name == train and views > 1 else "none"
            crop = "none"
        else:
            augment, crop = "none", "random" if name == train and name != "val" else "center"
        flipped = flips if augment == "shift" or crop == "random" else ()
        configs[name] = DecodeConfig(
            size=size,
            crop=crop,
            augment=augment,
            colour=colour if name == train and name != "val" else 0.0,
            flip_classes=flipped,
            fill=fill,
            seed=seed,
            reduced=reduced,
        )
    return configs
