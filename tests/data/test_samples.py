"""Samples folders: the grid, the npz, and a writer that goes on where it was killed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from varcli.artifacts.manifest import MANIFEST_NAME
from varcli.artifacts.verify import read_manifest, verify_folder
from varcli.data.png import save_png
from varcli.data.samples import (
    SamplesWriter,
    choose_for_grid,
    list_images,
    make_grid,
    read_images,
    sample_name,
    write_npz,
)
from varcli.errors import ArtifactError, ConfigError, DataError, LockedError, ShapeError

WANTED = [(class_index, index) for class_index in (0, 7) for index in range(3)]


def image(class_index: int, index: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * class_index + index)
    return torch.randint(0, 256, (3, 8, 8), dtype=torch.uint8, generator=generator)


def write(out, wanted=WANTED, settings=None, stop_after=None, **options):
    with SamplesWriter(out, settings or {"seed": 0, "cfg": 1.5}) as writer:
        missing = writer.missing(wanted)
        for pair in missing[:stop_after]:
            writer.write(*pair, image(*pair))
        return (len(missing), None if stop_after is not None else writer.finish(wanted, **options))


def test_a_folder_holds_the_images_a_grid_and_a_manifest(tmp_path):
    _, manifest = write(tmp_path / "out", info={"classes": ["a"]}, npz=True)
    assert sorted(manifest.files) == sorted([sample_name(*pair) for pair in WANTED] + ["grid.png", "samples.npz"])
    assert manifest.info == {"seed": 0, "cfg": 1.5, "classes": ["a"]}
    assert verify_folder(tmp_path / "out", read_manifest(tmp_path / "out", "samples")) == []
    paths = list_images(tmp_path / "out")
    assert [path.name for path in paths] == [sample_name(*pair) for pair in WANTED]
    assert torch.equal(torch.cat(list(read_images(paths, 4))), torch.stack([image(*pair) for pair in WANTED]))
    archive = np.load(tmp_path / "out" / "samples.npz", allow_pickle=False)
    assert archive.files == ["arr_0"]
    assert np.array_equal(archive["arr_0"][4], image(7, 1).permute(1, 2, 0).numpy())


def test_resuming_equals_never_stopping(tmp_path):
    _, expected = write(tmp_path / "whole", npz=True)
    write(tmp_path / "stopped", stop_after=4)
    assert not (tmp_path / "stopped" / MANIFEST_NAME).exists()
    num_missing, manifest = write(tmp_path / "stopped", npz=True)
    assert num_missing == 2
    assert manifest.digest == expected.digest


def test_more_images_can_be_added_later(tmp_path):
    write(tmp_path / "out")
    num_missing, manifest = write(tmp_path / "out", [*WANTED, (8, 0)])
    assert num_missing == 1
    assert len(manifest.files) == 8


def test_a_second_class_joins_the_first_in_manifest_and_archive(tmp_path):
    write(tmp_path / "out", WANTED[:3], npz=True)
    _, manifest = write(tmp_path / "out", WANTED[3:])
    assert {sample_name(*pair) for pair in WANTED} < set(manifest.files)
    archive = np.load(tmp_path / "out" / "samples.npz", allow_pickle=False)
    assert archive["arr_0"].shape[0] == len(WANTED)


def test_other_settings_are_not_mixed(tmp_path):
    write(tmp_path / "begun", stop_after=1)
    write(tmp_path / "finished")
    for name in ("begun", "finished"):
        with pytest.raises(ConfigError, match=r": cfg was 1\.5, now 2\.0$"):
            write(tmp_path / name, settings={"seed": 0, "cfg": 2.0})


def test_a_folder_in_which_nothing_was_drawn_is_begun_anew(tmp_path):
    """It was said to hold samples of other settings."""
    write(tmp_path / "out", stop_after=0)
    write(tmp_path / "out", settings={"seed": 1, "cfg": 1.5}, stop_after=1)
    with pytest.raises(ConfigError, match="seed was 1, now 2"):
        write(tmp_path / "out", settings={"seed": 2, "cfg": 1.5})


def test_settings_with_tuples_are_the_same_again(tmp_path):
    settings = {"patch_nums": (1, 2), "model": None}
    write(tmp_path / "out", settings=settings, stop_after=2)
    assert write(tmp_path / "out", settings=settings)[0] == 4
    assert write(tmp_path / "out", settings=settings)[0] == 0


def test_other_content_and_a_second_writer_are_refused(tmp_path):
    (tmp_path / "holiday.jpg").write_bytes(b"x")
    with pytest.raises(ArtifactError, match="holiday"):
        write(tmp_path)
    with SamplesWriter(tmp_path / "out", {}), pytest.raises(LockedError):
        SamplesWriter(tmp_path / "out", {}).__enter__()


def test_an_unfinished_or_damaged_folder_is_not_called_whole(tmp_path):
    with SamplesWriter(tmp_path / "out", {}) as writer:
        for pair in WANTED[:-1]:
            writer.write(*pair, image(*pair))
        with pytest.raises(ArtifactError, match="lacks 1 of 6"):
            writer.finish(WANTED)
        writer.write(*WANTED[-1], image(*WANTED[-1]))
        (tmp_path / "out" / sample_name(*WANTED[0])).write_bytes(b"torn")
        with pytest.raises(ArtifactError, match="damaged"):
            writer.finish(WANTED)
    assert not (tmp_path / "out" / MANIFEST_NAME).exists()


def test_the_grid_has_every_image_in_its_place():
    images = torch.stack([image(0, index) for index in range(5)])
    grid = np.asarray(make_grid(images, columns=3, padding=2))
    assert grid.shape == (2 * 10 + 2, 3 * 10 + 2, 3)
    assert np.array_equal(grid[12:20, 12:20], images[4].permute(1, 2, 0).numpy())
    assert (grid[12:20, 22:30] == 255).all()
    assert make_grid(images).size == (32, 22)


@pytest.mark.parametrize(
    "bad", [torch.zeros(2, 3, 8, 8), torch.zeros(3, 8, 8, dtype=torch.uint8), np.zeros((0, 3, 8, 8), np.uint8)]
)
def test_a_grid_of_something_else_is_refused(bad):
    with pytest.raises(ShapeError):
        make_grid(bad)


@pytest.mark.parametrize(
    ("num_classes", "per_class", "columns", "shape"),
    [
        (10, 32, None, (10, 8)),
        (10, 4, None, (10, 4)),
        (10, 32, 12, (10, 12)),
        (3, 1, None, (1, 3)),
        (100, 2, None, (16, 2)),
        (1000, 1, None, (1, 64)),
    ],
)
def test_a_grid_shows_every_class_in_a_row_of_its_own(num_classes, per_class, columns, shape):
    pairs = [(number, index) for number in range(num_classes) for index in range(per_class)]
    chosen, width = choose_for_grid(pairs, columns)
    assert len(chosen) == shape[0] * shape[1]
    assert set(chosen) <= set(pairs)
    if per_class > 1:
        assert width == shape[1]
        assert all(chosen[place][0] == chosen[place - place % width][0] for place in range(len(chosen)))
        assert len({number for number, _ in chosen}) == shape[0]


def test_a_grid_of_one_class_shows_its_first_images():
    pairs = [(3, index) for index in range(100)]
    assert choose_for_grid(pairs) == (pairs[:64], None)


@pytest.mark.parametrize("count", [2, 4])
def test_the_npz_holds_exactly_the_images_declared(tmp_path, count):
    pixels = [image(0, index).numpy() for index in range(3)]
    with pytest.raises(ShapeError, match="3 came"):
        write_npz(tmp_path / "a.npz", iter(pixels), count, 8)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ShapeError, match="must be uint8"):
        write_npz(tmp_path / "a.npz", iter(pixels), 3, 16)


def test_natural_order_puts_two_before_ten(tmp_path):
    for name in ("b/10.png", "b/2.png", "a10/1.png", "a9/1.png", "grid.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        save_png(tmp_path / name, image(0, 0))
    (tmp_path / "notes.txt").write_text("x")
    assert [path.relative_to(tmp_path).as_posix() for path in list_images(tmp_path)] == [
        *("a9/1.png", "a10/1.png"),
        *("b/2.png", "b/10.png"),
    ]


def test_bad_images_in_a_set_are_errors_not_skips(tmp_path):
    save_png(tmp_path / "1.png", image(0, 0))
    (tmp_path / "2.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"2\.png.*empty"):
        list(read_images(list_images(tmp_path)))
    Image.new("RGB", (9, 8)).save(tmp_path / "2.png")
    with pytest.raises(DataError, match="pixels"):
        list(read_images(list_images(tmp_path)))
    with pytest.raises(DataError, match="no folder"):
        list_images(tmp_path / "nothing")
