"""The images of a tokenizer's training: the same samples however they are read, and no hour lost to a broken file."""

from __future__ import annotations

import os
import subprocess
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_sets import draw, write_pngs

from varcli.data.defaults import default_decode
from varcli.data.images import open_images
from varcli.data.skips import Skips
from varcli.data.views import prepare
from varcli.errors import DataError, SkipLimitError
from varcli.training import pixels as pixels_module
from varcli.training.pixel_stream import PixelStream, spread_rows
from varcli.training.pixels import Pixels, open_pixels, read_held_out, read_pixels


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """13 images of 40 x 48 px in two classes."""
    for index, (name, count) in enumerate((("cat", 7), ("dog", 6))):
        images = [np.asarray(Image.fromarray(image).resize((48, 40))) for image in draw(count, index, 48)]
        write_pngs(tmp_path / "photos" / name, images)
    return tmp_path / "photos"


def spoil(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).write_text("not an image")


def open_stream(root: Path, workers: int = 0, size: int = 16, **options) -> PixelStream:
    tree = open_images(root, allow_single_class=True)
    return PixelStream(tree, "train", default_decode(tree, size, seed=3)["train"], seed=3, workers=workers, **options)


def take(images: PixelStream | Pixels, positions, count: int) -> list[torch.Tensor]:
    try:
        return [images.batch(position, count) for position in positions]
    finally:
        if isinstance(images, PixelStream):
            images.close()


def same(found, expected) -> bool:
    return len(found) == len(expected) and all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_batch_depends_on_seed_and_position_alone(photos):
    whole = torch.cat(take(open_stream(photos), [0], 48))
    for workers, count in ((0, 4), (2, 4), (1, 12)):
        batches = take(open_stream(photos, workers), range(0, 48, count), count)
        assert torch.equal(torch.cat(batches), whole)
    resumed = take(open_stream(photos, 2), [20, 24, 28], 4)
    assert torch.equal(torch.cat(resumed), whole[20:32])


def test_a_process_that_takes_every_other_slice_and_one_that_jumps_get_the_same_samples(photos):
    whole = take(open_stream(photos), [0], 60)[0]
    for positions in ([4, 12, 20, 28, 36], [40, 0, 8, 8, 4, 52], [0, 4, 8, 4, 8, 12]):
        found = take(open_stream(photos, 1), positions, 4)
        assert same(found, [whole[position : position + 4] for position in positions])


def test_a_process_that_takes_its_part_of_each_batch_starts_its_workers_once(photos, monkeypatch):
    started = []
    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: started.append(popen(*a, **k)) or started[-1])
    take(open_stream(photos, 1, batch_size=8), [4, 12, 20, 28], 4)
    assert len(started) == 1


def test_processes_on_one_machine_share_its_memory(tmp_path, monkeypatch):
    tree = open_images(write_pngs(tmp_path / "images", draw(9, 0, 16)), allow_single_class=True)
    right, sizes = os.sysconf, {"SC_PAGE_SIZE": 8, "SC_PHYS_PAGES": 9 * 3 * 16 * 16}  # a quarter is twice the images
    monkeypatch.setattr(os, "sysconf", lambda name: sizes.get(name) or right(name))
    for sharers, kind in ((1, Pixels), (2, Pixels), (3, PixelStream)):
        with open_pixels(tree, "train", 16, batch_size=2, workers=0, sharers=sharers) as images:
            assert type(images) is kind


def test_each_epoch_has_every_image_once_in_another_crop(photos):
    images = open_stream(photos)
    rows = [images.rows(epoch * 13, 13) for epoch in range(3)]
    assert all(sorted(places) == list(range(13)) for places in rows) and rows[0] != rows[1]
    views = [dict(zip(places, take(images, [n * 13], 13)[0], strict=True)) for n, places in enumerate(rows)]
    changed = [place for place in range(13) if not torch.equal(views[0][place], views[1][place])]
    assert len(changed) >= 10  # a crop of 18 x 22 to 16 px has 21 places


@pytest.fixture(params=["memory", "stream"])
def source(request, tmp_path, monkeypatch):
    """Nine images of 16 px as each kind of ImageSource, and the images themselves."""
    images = draw(9, 0, 16)
    tree = open_images(write_pngs(tmp_path / "images", images), allow_single_class=True)
    if request.param == "stream":
        monkeypatch.setattr(pixels_module, "_MAX_BYTES", 100)
    with open_pixels(tree, "train", 16, batch_size=4, seed=1, workers=0) as opened:
        assert type(opened) is {"memory": Pixels, "stream": PixelStream}[request.param]
        yield opened, torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


def test_every_source_of_images_keeps_the_contract(source):
    found, images = source
    assert len(found) == 9
    whole = found.batch(0, 27)
    assert (whole.dtype, whole.shape) == (torch.uint8, (27, 3, 16, 16))
    rows = found.rows(0, 27)
    assert all(sorted(rows[epoch : epoch + 9]) == list(range(9)) for epoch in (0, 9, 18)) and rows[:9] != rows[9:18]
    assert torch.equal(whole, images[rows])
    for position, count in ((0, 4), (4, 4), (20, 5), (3, 1)):
        assert torch.equal(found.batch(position, count), whole[position : position + count])
        assert found.rows(position, count) == rows[position : position + count]
    assert torch.equal(found.spread(3), images[[0, 4, 8]]) and torch.equal(found.spread(100), images)


def test_memory_and_stream_give_the_same_samples_of_images_that_have_the_size(tmp_path, monkeypatch):
    root = write_pngs(tmp_path / "images" / "a", draw(9, 0, 16)).parent
    (root / "b").mkdir()
    spoil(root / "a", "3.png", "4.png", "8.png")
    tree = open_images(root, allow_single_class=True)

    def read() -> list[torch.Tensor]:
        with open_pixels(tree, "train", 16, batch_size=5, seed=1, workers=0) as images:
            kinds.append(type(images))
            assert len(images) == 9
            return [images.batch(position, 5) for position in range(0, 40, 5)]

    kinds = []
    kept = read()
    monkeypatch.setattr(pixels_module, "_MAX_BYTES", 100)
    assert same(read(), kept)
    assert kinds == [Pixels, PixelStream]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unusable_image_has_the_next_one_in_its_place(photos, workers):
    order = open_stream(photos).rows(0, 39)
    spoil(photos / "cat", "2.png", "3.png", "6.png")
    spoil(photos / "dog", "5.png")
    told = []
    tree = open_images(photos)
    images = open_stream(photos, workers, skips=Skips(tree, None, told.append))
    found = take(images, [0, 13, 26], 13)
    assert [len(batch) for batch in found] == [13, 13, 13]
    stands_in = {2: 4, 3: 4, 6: 7, 12: 0}
    assert images.rows(0, 39) == [stands_in.get(place, place) for place in order]
    assert same(found, take(open_stream(photos, 0), [0, 13, 26], 13))
    first = dict(zip(order[:13], found[0], strict=True))
    assert torch.equal(first[2], first[4]) and torch.equal(first[12], first[0])
    assert len(told) == 1 and "cannot be used and others stand in for them" in told[0]


def test_many_unusable_images_are_one_error_that_names_the_limit(photos):
    spoil(photos / "cat", "1.png", "2.png")
    tree = open_images(photos)
    images = open_stream(photos, 1, skips=Skips(tree, 1))
    with pytest.raises(SkipLimitError, match="2 images cannot be used, but at most 1 may be skipped") as caught:
        take(images, range(0, 26, 13), 13)
    assert "--max-skip" in caught.value.hint


@pytest.mark.parametrize("size", [16, 32])  # streamed, and kept in memory
def test_too_few_usable_images_are_told_apart_from_too_few(tmp_path, size):
    root = write_pngs(tmp_path / "images", draw(6, 0, 32))
    tree = open_images(root, allow_single_class=True)

    def read(batch_size: int) -> None:
        with open_pixels(tree, "train", size, batch_size=batch_size, workers=0) as images:
            for step in range(4):
                images.batch(step * batch_size, batch_size)

    with pytest.raises(DataError, match="there are 6 images to train on, fewer than one batch of 7"):
        read(7)
    spoil(root, "0.png", "1.png")
    with pytest.raises(DataError, match="at most 4 of the 6 images to train on can be used, fewer than one batch of 5"):
        read(5)
    spoil(root, *(f"{number}.png" for number in range(6)))
    with pytest.raises(DataError, match=r"none of the 6 images to train on can be used, e.g. `.*not an image"):
        read(1)


@pytest.mark.parametrize("error", [None, KeyboardInterrupt, DataError("elsewhere")])
def test_workers_and_threads_end_with_the_block_whatever_ends_it(photos, monkeypatch, error):
    started, threads = [], threading.active_count()
    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: started.append(popen(*a, **k)) or started[-1])
    try:
        with open_pixels(open_images(photos), "train", 16, batch_size=4, workers=2) as images:
            images.batch(0, 4)
            if error is not None:
                raise error
    except (KeyboardInterrupt, DataError):
        pass
    assert len(started) == 2 and all(process.poll() is not None for process in started)
    assert threading.active_count() == threads


def test_a_killed_worker_is_an_error_and_no_hang(photos, monkeypatch):
    started = []
    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: started.append(popen(*a, **k)) or started[-1])
    with open_pixels(open_images(photos), "train", 16, batch_size=4, workers=1) as images:
        images.batch(0, 4)
        started[0].kill()
        with pytest.raises(DataError, match="worker died"):
            for step in range(1, 50):
                images.batch(4 * step, 4)


def test_no_more_than_a_few_batches_are_decoded_ahead(photos):
    images = open_stream(photos)
    asked = []
    pairs = images._pairs
    images._pairs = lambda position, count: asked.append(position) or pairs(position, count)
    images.batch(0, 4)
    threading.Event().wait(0.5)
    images.close()
    assert len(asked) <= 6


def test_held_out_images_are_capped_with_an_even_spread(tmp_path, monkeypatch):
    root = tmp_path / "images"
    for split, count in (("train", 3), ("val", 10)):
        write_pngs(root / split / "a", draw(count, count, 16))
    tree = open_images(root, allow_single_class=True)
    every = read_held_out(tree, "val", 16, workers=0)
    assert len(every) == 10
    monkeypatch.setattr(pixels_module, "_MAX_HELD_OUT", 4)
    some = read_held_out(tree, "val", 16, workers=0)
    assert torch.equal(some, every[[0, 3, 6, 9]])
    spoil(root / "val" / "a", "3.png")
    assert torch.equal(read_held_out(tree, "val", 16, workers=0), every[[0, 6, 9]])


def test_a_spread_reaches_from_the_first_to_the_last():
    assert spread_rows(1000, 3).tolist() == [0, 500, 999]
    assert spread_rows(3, 10).tolist() == [0, 1, 2]
    images = Pixels(torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1))
    assert images.spread(4).flatten().tolist() == [0, 3, 6, 9]


def test_a_streams_spread_is_cut_in_the_centre(photos):
    tree = open_images(photos)
    images = open_stream(photos)
    centre = replace(images.config, crop="center")
    cut, _ = read_pixels(tree, "train", centre, np.arange(13), 0, Skips(tree))
    assert torch.equal(images.spread(100), cut)
    assert torch.equal(images.spread(4), cut[[0, 4, 8, 12]])
    for image, path in zip(cut, tree.splits["train"].paths, strict=True):
        with Image.open(photos / path) as opened:
            prepared = prepare(opened.convert("RGB"), centre)
        left, top = ((side - 16) // 2 for side in prepared.size)
        expected = np.asarray(prepared)[top : top + 16, left : left + 16]
        assert (image.permute(1, 2, 0).int() - torch.tensor(expected).int()).abs().max() <= 1


def test_unusable_images_are_told_once_and_the_rest_at_the_end(photos):
    spoil(photos / "cat", "1.png", "2.png", "3.png")
    told = []
    tree = open_images(photos)
    with open_pixels(tree, "train", 16, batch_size=1, workers=0, skips=Skips(tree, None, told.append)) as images:
        for position in range(13):
            images.batch(position, 1)
        assert len(told) == 1
    assert len(told) == 2 and "warning: " in told[1]
