"""Sets of images: every kind gives the same pixels, and what is not one set is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from varcli.data.images import open_images
from varcli.data.samples import SamplesWriter
from varcli.errors import ArtifactError, DataError, IntegrityError, ShapeError
from varcli.metrics.npz import open_npz
from varcli.metrics.sources import from_folder, from_npz, from_tensor, from_tree

IMAGES = np.random.default_rng(0).integers(0, 256, (12, 3, 8, 8), dtype=np.uint8)


def write_samples(folder, images=IMAGES):
    with SamplesWriter(folder, {"seed": 0}) as writer:
        pairs = [(number % 3, number // 3) for number in range(len(images))]
        for pair, image in zip(pairs, images):
            writer.write(*pair, image)
        writer.finish(pairs, {"classes": ["a", "b", "c"]})
    return folder


def pixels(source) -> torch.Tensor:
    return torch.cat(list(source.batches(5)))


def test_every_kind_gives_the_same_pixels(tmp_path):
    for number, image in enumerate(IMAGES):
        (tmp_path / "flat").mkdir(exist_ok=True)
        Image.fromarray(image.transpose(1, 2, 0)).save(tmp_path / "flat" / f"{number}.png")
    np.savez(tmp_path / "set.npz", arr_0=IMAGES.transpose(0, 2, 3, 1))
    tree = open_images(tmp_path / "flat", allow_single_class=True)
    by_name = [tree.splits["train"].paths.index(f"{number}.png") for number in range(12)]
    for source in (
        from_folder(tmp_path / "flat"),
        from_npz(open_npz(tmp_path / "set.npz")),
        from_tensor(torch.from_numpy(IMAGES)),
        from_tree(tree, "train", 8, np.array(by_name)),
    ):
        assert (source.count, source.height, source.width) == (12, 8, 8)
        assert torch.equal(pixels(source), torch.from_numpy(IMAGES))


def test_a_samples_folder_is_read_by_its_manifest(tmp_path):
    folder = write_samples(tmp_path / "samples")
    Image.new("RGB", (8, 8)).save(folder / "another.png")
    source = from_folder(folder)
    assert source.count == 12
    assert source.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert source.classes == ("a", "b", "c")


def test_a_changed_sample_is_named(tmp_path):
    folder = write_samples(tmp_path / "samples")
    Image.new("RGB", (8, 8)).save(folder / "0001-00002.png")
    with pytest.raises(IntegrityError, match=r"0001-00002\.png"):
        from_folder(folder)


def test_unfinished_samples_are_refused(tmp_path):
    with SamplesWriter(tmp_path / "samples", {"seed": 0}) as writer:
        writer.write(0, 0, IMAGES[0])
    with pytest.raises(DataError, match="is an unfinished samples folder of varcli"):
        from_folder(tmp_path / "samples")


def test_a_folder_of_another_kind_is_refused(tmp_path):
    from varcli.artifacts.manifest import write_manifest

    write_manifest(tmp_path, "codes", {})
    with pytest.raises(ArtifactError, match="is a codes folder"):
        from_folder(tmp_path)


def test_mixed_sizes_are_refused(tmp_path):
    for side in (8, 9):
        Image.new("RGB", (side, side)).save(tmp_path / f"{side}.png")
    with pytest.raises(DataError, match=r"9\.png"):
        pixels(from_folder(tmp_path))


def test_a_damaged_image_is_an_error_and_no_skip(tmp_path):
    for name in ("ant", "bee"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / name / "1.png")
    (tmp_path / "ant" / "2.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"2\.png"):
        pixels(from_tree(open_images(tmp_path), "train", 8))
    with pytest.raises(DataError, match=r"2\.png"):
        pixels(from_folder(tmp_path))


def test_large_real_images_are_cut_and_small_ones_refused(tmp_path):
    for name in ("ant", "bee"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (40, 30)).save(tmp_path / name / "1.jpg")
    tree = open_images(tmp_path)
    source = from_tree(tree, "train", 16)
    assert pixels(source).shape == (2, 3, 16, 16)
    assert source.preparation == "centre crops of 16 px, shorter edge at 18"
    assert source.num_jpeg == 2
    with pytest.raises(DataError, match="mostly smaller"):
        from_tree(tree, "train", 64)


@pytest.mark.parametrize("images", [torch.zeros(2, 3, 8, 8), torch.zeros(2, 1, 8, 8, dtype=torch.uint8)])
def test_tensors_that_are_no_images_are_refused(images):
    with pytest.raises(ShapeError):
        from_tensor(images)
