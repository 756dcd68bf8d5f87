"""emoji64: whole, split by code point, unpacked safely."""

from __future__ import annotations

import csv
import errno
import importlib.util
import shutil
import sys
import zipfile
from collections import defaultdict
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest

from varcli.data.defaults import default_decode
from varcli.data.emoji import EMOJI64_CLASSES, EMOJI64_FLIP_CLASSES, unpack_emoji64
from varcli.data.images import decode_images, open_images
from varcli.errors import ArtifactError

ZIP = files("varcli") / "embedded" / "emoji64.zip"


@pytest.fixture(scope="module")
def build_script():
    path = Path(__file__).resolve().parents[2] / "examples" / "build_emoji64.py"
    spec = importlib.util.spec_from_file_location("build_emoji64", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["build_emoji64"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["build_emoji64"]


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    out = tmp_path_factory.mktemp("data") / "emoji64"
    return unpack_emoji64(out)


def test_it_reads_as_an_image_tree(unpacked):
    tree = open_images(unpacked.folder)
    assert tree.classes == unpacked.classes == EMOJI64_CLASSES
    assert set(EMOJI64_FLIP_CLASSES) < set(EMOJI64_CLASSES)
    assert {name: len(split) for name, split in tree.splits.items()} == {"train": 4762, "val": 535}
    assert tree.num_images == unpacked.num_images
    assert tree.skipped == ()
    for split in tree.splits.values():
        assert np.bincount(split.labels, minlength=10).min() >= 20


def test_every_tenth_image_decodes_to_64_pixels(unpacked):
    tree = open_images(unpacked.folder)
    config = default_decode(tree, 64, views=2)["train"]
    assert (config.crop, config.augment) == ("none", "shift")
    for batch in decode_images(tree, "train", config, range(0, 4762, 10), workers=0):
        assert not batch.skipped
        assert not batch.notes


def test_no_emoji_stands_on_both_sides(unpacked):
    sides = defaultdict(set)
    with open(unpacked.folder / "index.csv", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            split = row["path"].split("/")[0]
            for key in ("code", "group"):
                sides[key, row[key]].add(split)
            sides["gender", row["code"].replace("1f468", "1f9d1").replace("1f469", "1f9d1")].add(split)
            assert (unpacked.folder / row["path"]).is_file()
    assert len(sides) > 3000
    assert all(len(splits) == 1 for splits in sides.values())


def test_no_picture_stands_on_both_sides(unpacked):
    tree = open_images(unpacked.folder)
    config = default_decode(tree, 64)["val"]
    held_out = [b.images.numpy() for b in decode_images(tree, "val", config, workers=0)]
    seen = [b.images.numpy() for b in decode_images(tree, "train", config, workers=2)]
    held_out_bytes = {image.tobytes() for batch in held_out for image in batch}
    assert not held_out_bytes & {image.tobytes() for batch in seen for image in batch}


@pytest.mark.parametrize(
    ("codes", "family"),
    [
        (("1f9d1-200d-1f680", "1f468-200d-1f680", "1f469-200d-1f680"), "1f9d1-200d-1f680"),  # astronauts
        (("1f3c3", "1f3c3-200d-2640", "1f3c3-200d-2642-200d-27a1"), "1f3c3"),  # runners
        (("1f600",), "1f600"),
    ],
)
def test_genders_and_directions_of_an_emoji_are_one_family(build_script, codes, family):
    assert {build_script.family_of(code, "SOME NAME") for code in codes} == {family}


def test_the_split_is_a_hash_of_the_group(build_script, unpacked):
    with open(unpacked.folder / "index.csv", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            assert row["path"].startswith(build_script.split_of(row["group"]) + "/")


def test_country_flags_have_no_fluent_drawing():
    # Microsoft's MIT release leaves them out
    with zipfile.ZipFile(ZIP) as archive:
        fluent = [name for name in archive.namelist() if "Flags" in name and name.endswith("-fluent.webp")]
    assert fluent
    assert not [name for name in fluent if "/1f1" in name]


def test_the_zip_is_small_dated_sorted_and_carries_its_licences():
    with zipfile.ZipFile(ZIP) as archive:
        names = archive.namelist()
        assert names == sorted(names)
        assert len({info.date_time for info in archive.infolist()}) == 1
        notice = archive.read("NOTICE.md").decode()
    for word in ("Noto Emoji", "Apache License", "Twemoji", "CC-BY 4.0", "Microsoft", "Permission is hereby granted"):
        assert word in notice
    section = notice[notice.index("## emoji64.zip") : notice.index("### The MIT licence")]
    assert section in (files("varcli") / "embedded" / "NOTICE.md").read_text("utf-8")
    assert ZIP.stat().st_size < 14e6


def test_unpacking_again_does_nothing_and_restores_what_is_missing(tmp_path):
    out = tmp_path / "emoji64"
    out.mkdir()  # an empty folder is as good as none
    assert unpack_emoji64(out).num_written > 5000
    assert unpack_emoji64(out).num_written == 0
    lost = sorted(out.rglob("*.webp"))[:3]
    data = [path.read_bytes() for path in lost]
    for path in lost:
        path.unlink()
    assert unpack_emoji64(out).num_written == 3
    assert [path.read_bytes() for path in lost] == data
    assert [path.name for path in tmp_path.iterdir()] == ["emoji64"]


@pytest.mark.parametrize("case", ["foreign file", "changed file", "a file in the way", "link"])
def test_other_content_is_never_overwritten(tmp_path, case):
    out = tmp_path / "out"
    if case == "a file in the way":
        out.write_text("mine")
    else:
        out.mkdir()
        (out / "NOTICE.md").write_text("mine")
        if case == "foreign file":
            (out / "NOTICE.md").rename(out / "holiday.png")
        elif case == "link":
            (out / "NOTICE.md").rename(tmp_path / "kept")
            (out / "NOTICE.md").symlink_to(tmp_path / "kept")
    before = sorted(path.name for path in tmp_path.rglob("*"))
    with pytest.raises(ArtifactError) as caught:
        unpack_emoji64(out)
    assert "choose another --out" in caught.value.hint
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


def test_a_zip_that_leads_out_is_refused(tmp_path, monkeypatch):
    package = tmp_path / "package"
    (package / "embedded").mkdir(parents=True)
    with zipfile.ZipFile(package / "embedded" / "emoji64.zip", "w") as archive:
        archive.writestr("train/../../evil.png", b"x")
    monkeypatch.setattr("varcli.data.emoji.files", lambda name: package)
    with pytest.raises(ArtifactError, match="outside"):
        unpack_emoji64(tmp_path / "out")
    assert not (tmp_path / "evil.png").exists()


def test_a_damaged_zip_leaves_nothing_behind(tmp_path, monkeypatch):
    package = tmp_path / "package"
    (package / "embedded").mkdir(parents=True)
    with zipfile.ZipFile(package / "embedded" / "emoji64.zip", "w") as archive:
        archive.writestr("train/A/a.webp", b"x" * 100)
    path = package / "embedded" / "emoji64.zip"
    path.write_bytes(path.read_bytes().replace(b"x" * 100, b"y" * 100))
    monkeypatch.setattr("varcli.data.emoji.files", lambda name: package)
    with pytest.raises(ArtifactError, match="damaged"):
        unpack_emoji64(tmp_path / "data" / "out")
    assert not (tmp_path / "data" / "out").exists()


@pytest.mark.parametrize("at", ["once", "in the middle"])
def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch, at):
    if at == "once":
        free = shutil.disk_usage(tmp_path)._replace(free=3_000_000)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    else:

        def fill(archive, tree):
            tree.mkdir()
            (tree / "index.csv").write_bytes(b"")
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(zipfile.ZipFile, "extractall", fill)
    with pytest.raises(ArtifactError, match="3\\.0 MB free" if at == "once" else "No space left"):
        unpack_emoji64(tmp_path / "emoji64")
    assert not list(tmp_path.iterdir())
