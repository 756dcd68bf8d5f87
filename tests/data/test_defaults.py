"""What is done with images where the user says nothing."""

from __future__ import annotations

import numpy as np
from PIL import Image

from varcli.data.defaults import default_decode
from varcli.data.images import open_images


def test_images_of_the_size_wanted_are_used_whole_and_varied_in_training(tiny_images):
    configs = default_decode(open_images(tiny_images), 32, views=4, seed=5)
    assert (configs["train"].crop, configs["train"].augment, configs["train"].seed) == ("none", "shift", 5)
    assert (configs["val"].crop, configs["val"].augment) == ("none", "none")
    assert default_decode(open_images(tiny_images), 32)["train"].augment == "none"


def test_other_images_are_cropped_as_var_does(tiny_images):
    configs = default_decode(open_images(tiny_images), 16, views=4)
    assert [configs[name].crop for name in ("train", "val")] == ["random", "center"]
    assert configs["train"].flip_classes == ()


def test_one_image_of_another_size_is_enough_to_crop_all(tiny_images):
    Image.fromarray(np.zeros((32, 40, 3), np.uint8)).save(tiny_images / "train" / "apple" / "0.png")
    assert default_decode(open_images(tiny_images), 32)["train"].crop == "random"
