"""Image folders: which layouts are understood, and what is said of those that are not."""

from __future__ import annotations

import gzip
import os
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from varcli.artifacts.manifest import write_manifest
from varcli.data.images import DecodeConfig, decode_images, open_images
from varcli.errors import DataError


def picture(path: Path, size: tuple[int, int] = (8, 8), color: str = "red") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)
    return path


def test_split_folders_give_classes_and_sorted_paths(tiny_images):
    tree = open_images(tiny_images)
    assert tree.classes == ("apple", "boat", "cat")
    assert list(tree.splits) == ["train", "val"]
    assert tree.splits["train"].paths[:2] == ("train/apple/0.png", "train/apple/1.png")
    assert tree.splits["val"].labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert tree.num_images == 21


def test_flat_folders_are_one_split(tiny_images):
    tree = open_images(tiny_images / "train")
    assert list(tree.splits) == ["train"]
    assert tree.splits["train"].paths[0] == "apple/0.png"


def test_a_class_called_train_is_a_class(tmp_path):
    picture(tmp_path / "train" / "a.png")
    picture(tmp_path / "plane" / "a.png")
    assert open_images(tmp_path).classes == ("plane", "train")


def test_what_varcli_wrote_beside_the_classes_is_none_and_a_class_with_a_manifest_of_its_own_is(tmp_path):
    for name in ("a", "b", "codes", "unfinished", "theirs"):
        picture(tmp_path / name / "1.png")
    write_manifest(tmp_path / "codes", "codes", {}, files=["1.png"])
    (tmp_path / "unfinished" / ".plan.json").write_text("{}")
    (tmp_path / "theirs" / "manifest.json").write_text("{}")
    assert open_images(tmp_path).classes == ("a", "b", "theirs")


def test_an_empty_class_keeps_its_number(tmp_path):
    picture(tmp_path / "a" / "1.png")
    (tmp_path / "b").mkdir()
    picture(tmp_path / "c" / "1.png")
    tree = open_images(tmp_path)
    assert tree.classes == ("a", "b", "c")
    assert tree.splits["train"].labels.tolist() == [0, 2]


def test_images_below_a_class_belong_to_it_and_other_files_are_counted(tmp_path):
    picture(tmp_path / "a" / "deep" / "er" / "1.PNG")
    picture(tmp_path / "b" / "1.jpeg")
    for name in ("a/.hidden.png", "a/Thumbs.db", "b/readme.txt", "notes.md"):
        (tmp_path / name).write_text("x")
    tree = open_images(tmp_path)
    assert tree.splits["train"].paths == ("a/deep/er/1.PNG", "b/1.jpeg")
    assert tree.num_ignored == 4


def test_links_that_lead_out_are_skipped_unless_followed(tmp_path):
    outside = picture(tmp_path / "outside" / "1.png")
    root = tmp_path / "root"
    picture(root / "a" / "1.png")
    picture(root / "b" / "1.png")
    (root / "a" / "2.png").symlink_to(outside)
    (root / "a" / "3.png").symlink_to(root / "b" / "1.png")
    (root / "a" / "dangling.png").symlink_to(root / "nothing.png")
    (root / "a" / "loop.png").symlink_to(root / "a" / "loop.png")
    (root / "c").symlink_to(tmp_path / "outside")
    os.mkfifo(root / "b" / "pipe.png")
    tree = open_images(root)
    assert tree.splits["train"].paths == ("a/1.png", "a/3.png", "b/1.png")
    assert dict(tree.skipped) == {
        "c": "link out of the folder",
        "a/2.png": "link out of the folder",
        "a/dangling.png": "link to nothing",
        "a/loop.png": "link in a loop",
        "b/pipe.png": "not a regular file",
    }
    followed = open_images(root, follow_links=True)
    assert followed.classes == ("a", "b", "c")
    assert "a/2.png" in followed.splits["train"].paths


def test_followed_links_that_loop_end(tmp_path):
    picture(tmp_path / "a" / "1.png")
    picture(tmp_path / "b" / "1.png")
    (tmp_path / "a" / "again").symlink_to(tmp_path / "a")
    assert len(open_images(tmp_path, follow_links=True).splits["train"]) == 2


def test_names_that_are_not_text_are_read(tmp_path):
    picture(tmp_path / "a" / "line\nbreak.png")
    picture(tmp_path / "b" / "[/red].png")
    raw = os.fsencode(tmp_path / "b") + b"/\xff.png"
    os.rename(picture(tmp_path / "b" / "x.png"), raw)
    tree = open_images(tmp_path)
    batch = next(decode_images(tree, "train", DecodeConfig(size=8), workers=1))
    assert len(batch.images) == 3


@pytest.mark.parametrize(
    ("files", "message", "hint"),
    [
        ((), "holds nothing", "CLASS"),
        (("a/readme.txt",), "1 file, but no image", ".png"),
        (("a/1.png", "a/2.png"), "one class only", "one folder of images for each class"),
        (("1.png", "2.png"), "no class folders", "one folder for each class"),
        (("train/a/1.png", "train/b/1.png", "val/c/1.png"), "class `c` is in val/", "same class folders"),
        (("train/a/1.png", "val/a/1.png", "valid/a/1.png"), "two validation folders", None),
    ],
)
def test_folders_that_cannot_work_say_why(tmp_path, files, message, hint):
    for name in files:
        path = tmp_path / name
        if path.suffix == ".png":
            picture(path)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("x")
    with pytest.raises(DataError, match=message) as caught:
        open_images(tmp_path)
    assert hint is None or hint in caught.value.hint


def test_a_missing_folder_and_an_archive_are_told_apart(tmp_path):
    with pytest.raises(DataError, match="there is no folder"):
        open_images(tmp_path / "nothing")
    (tmp_path / "images.zip").write_bytes(b"PK")
    with pytest.raises(DataError) as caught:
        open_images(tmp_path / "images.zip")
    assert "unpack" in caught.value.hint


def test_one_class_is_taken_when_allowed(tmp_path):
    picture(tmp_path / "cats" / "1.png")
    assert open_images(tmp_path, allow_single_class=True).classes == ("cats",)
    assert open_images(tmp_path / "cats", allow_single_class=True).classes == ("cats",)


def write_idx(path: Path, array: np.ndarray) -> None:
    header = bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape)
    data = header + array.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


@pytest.fixture
def idx_folder(tmp_path: Path) -> Path:
    """A Fashion-MNIST look-alike: 30 and 10 images."""
    root = tmp_path / "fashion-mnist"
    root.mkdir()
    random = np.random.default_rng(0)
    for name, count, suffix in (("train", 30, ".gz"), ("t10k", 10, "")):
        write_idx(root / f"{name}-images-idx3-ubyte{suffix}", random.integers(1, 256, (count, 28, 28)))
        write_idx(root / f"{name}-labels-idx1-ubyte{suffix}", np.arange(count) % 10)
    return root


def test_idx_folders_are_padded_and_named(idx_folder):
    tree = open_images(idx_folder)
    assert tree.classes[:2] == ("T-shirt or top", "Trouser")
    assert {name: len(split) for name, split in tree.splits.items()} == {"train": 30, "val": 10}
    config = DecodeConfig(size=32, crop="none", fill=(0, 0, 0))
    batch = next(decode_images(tree, "val", config, workers=0))
    assert tuple(batch.images.shape) == (10, 3, 32, 32)
    assert batch.images[:, :, :2].sum() == 0
    assert batch.images[:, :, 2:30, 2:30].min() > 0
    assert batch.labels.tolist() == list(range(10))


def test_idx_classes_may_be_named_in_a_file(idx_folder):
    (idx_folder / "classes.txt").write_text("\n".join("abcdefghij"))
    assert open_images(idx_folder).classes == tuple("abcdefghij")


@pytest.mark.parametrize("damage", ["truncate", "labels", "missing", "header", "huge"])
def test_damaged_idx_files_are_refused(idx_folder, damage):
    images, labels = idx_folder / "t10k-images-idx3-ubyte", idx_folder / "t10k-labels-idx1-ubyte"
    if damage == "truncate":
        images.write_bytes(images.read_bytes()[:-1])
    elif damage == "labels":
        write_idx(labels, np.arange(9))
    elif damage == "missing":
        labels.unlink()
    elif damage == "header":
        images.write_bytes(b"<html>" + images.read_bytes())
    else:
        images.write_bytes(bytes((0, 0, 8, 3)) + struct.pack(">3I", 2**31, 2**31, 2**31))
    with pytest.raises(DataError):
        open_images(idx_folder)
