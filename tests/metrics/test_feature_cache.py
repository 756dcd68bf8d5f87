"""Features that are kept are the features that would be computed; nothing is computed twice, and nothing stale is used."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from varcli.distributed import World
from varcli.errors import ConfigError, DataError, NumericError
from varcli.metrics import feature_cache, features, sources
from varcli.metrics.feature_cache import align_batch
from varcli.metrics.features import extract_features
from varcli.metrics.npz import open_npz
from varcli.metrics.sources import from_folder, from_npz, from_tensor

COUNT, SIDE = 21, 8


class MeanColour:
    """A network of three features, which remembers how many images it saw."""

    name, num_features, batch_size, weights_sha256 = "mean", 3, 4, "0" * 64
    device = torch.device("cpu")

    def __init__(self, stop_after: int | None = None) -> None:
        self.seen, self.stop_after = 0, stop_after

    def extract(self, images_B3HW, spatial=False):
        self.seen += len(images_B3HW)
        if self.stop_after is not None and self.seen > self.stop_after:
            raise KeyboardInterrupt
        flat = images_B3HW.float().flatten(2)
        return flat.mean(dim=2), flat.amax(dim=2) if spatial else None

    def logits(self, features):
        return features * 2

    def preprocessing(self, height, width):
        return "none"


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(feature_cache, "SHARD_IMAGES", 8)
    monkeypatch.setattr(features, "CACHE_FROM", 10)


@pytest.fixture
def folder(tmp_path) -> Path:
    place = tmp_path / "images"
    place.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (COUNT, SIDE, SIDE, 3), dtype=np.uint8)
    pixels[20] = pixels[3]
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(place / f"{number:03d}.png")
    np.savez(tmp_path / "images.npz", arr_0=pixels)
    return place


def same(first, second) -> bool:
    return all(
        np.array_equal(getattr(first, name), getattr(second, name)) for name in ("features", "spatial", "logits")
    )


def test_kept_features_are_those_computed(folder, tmp_path):
    source = from_folder(folder)
    plain = extract_features(source, MeanColour(), spatial=True)
    kept = extract_features(source, MeanColour(), spatial=True, cache=tmp_path / "cache")
    again, network = None, MeanColour()
    again = extract_features(source, network, spatial=True, cache=tmp_path / "cache")
    assert same(plain, kept) and same(plain, again)
    assert network.seen == 0
    assert plain.num_repeated == kept.num_repeated == again.num_repeated == 2
    assert isinstance(again.features, np.memmap)


def test_after_a_kill_only_what_is_missing_is_computed(folder, tmp_path):
    source = from_folder(folder)
    with pytest.raises(KeyboardInterrupt):
        extract_features(source, MeanColour(stop_after=16), cache=tmp_path / "cache")
    written = len(list((tmp_path / "cache").glob("*/rows-*"))) * feature_cache.SHARD_IMAGES
    assert written >= 8  # the batch that was at work is lost
    network = MeanColour()
    kept = extract_features(source, network, cache=tmp_path / "cache")
    assert network.seen == COUNT - written
    assert np.array_equal(kept.features, extract_features(source, MeanColour()).features)


def test_other_pixels_networks_and_sizes_are_other_features(folder, tmp_path):
    cache = tmp_path / "cache"
    extract_features(from_folder(folder), MeanColour(), cache=cache)
    Image.new("RGB", (SIDE, SIDE)).save(folder / "007.png")
    network = MeanColour()
    changed = extract_features(from_folder(folder), network, cache=cache)
    assert network.seen == COUNT and not changed.features[7].any()
    network = MeanColour()
    network.weights_sha256 = "1" * 64
    extract_features(from_folder(folder), network, cache=cache)
    assert network.seen == COUNT
    assert len(list(cache.iterdir())) == 3


def test_a_damaged_cache_is_computed_again(folder, tmp_path):
    source = from_folder(folder)
    plain = extract_features(source, MeanColour(), cache=tmp_path / "cache")
    (file,) = (tmp_path / "cache").glob("*/features.npy")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))
    again = extract_features(source, MeanColour(), cache=tmp_path / "cache")
    assert np.array_equal(plain.logits, again.logits)


def test_few_images_and_images_in_memory_are_not_kept(folder, tmp_path, monkeypatch):
    images = torch.cat(list(from_folder(folder).batches(8)))
    extract_features(from_tensor(images), MeanColour(), cache=tmp_path / "cache")
    monkeypatch.setattr(features, "CACHE_FROM", COUNT + 1)
    extract_features(from_folder(folder), MeanColour(), cache=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
    with pytest.raises(ConfigError, match="several processes"):
        extract_features(from_tensor(images), MeanColour(), cache=tmp_path / "cache", world=World(0, 2))


def test_features_that_are_no_numbers_are_refused_and_not_kept(folder, tmp_path):
    network = MeanColour()
    network.extract = lambda images, spatial=False: (torch.full((len(images), 3), float("nan")), None)
    with pytest.raises(NumericError):
        extract_features(from_folder(folder), network, cache=tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*.npy"))


@dataclass(frozen=True)
class Threads(World):
    """Ranks that are threads of this process."""

    barrier: threading.Barrier = field(default_factory=lambda: threading.Barrier(1))

    def wait(self) -> None:
        self.barrier.wait(timeout=30)


@pytest.mark.parametrize("size", [2, 5])
def test_any_number_of_ranks_gives_the_same_rows_and_shares_the_work(folder, tmp_path, size):
    source, barrier = from_folder(folder), threading.Barrier(size)
    networks, results = [MeanColour() for _ in range(size)], {}

    def work(rank: int) -> None:
        world = Threads(rank, size, barrier=barrier)
        results[rank] = extract_features(source, networks[rank], True, cache=tmp_path / "cache", world=world)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    alone = extract_features(source, MeanColour(), spatial=True)
    assert all(same(results[rank], alone) for rank in range(size))
    assert sum(network.seen for network in networks) == COUNT
    assert max(network.seen for network in networks) <= 16


def test_parts_of_a_source_are_the_whole(folder, tmp_path):
    file = from_npz(open_npz(tmp_path / "images.npz"))
    for source in (from_folder(folder), file):
        whole = torch.cat(list(source.batches(64)))
        parts = [image for start in (0, 5, 13) for image in source.batches(4, start, {0: 5, 5: 13, 13: COUNT}[start])]
        assert torch.equal(torch.cat(parts), whole) and len(whole) == COUNT


def test_workers_read_what_this_process_reads(folder, monkeypatch):
    here = torch.cat(list(from_folder(folder).batches(8)))
    monkeypatch.setattr(sources, "_WORKERS_FROM", 1)
    there = from_folder(folder)
    assert torch.equal(torch.cat(list(there.batches(8, workers=2))), here)
    Image.new("RGB", (SIDE, SIDE + 1)).save(folder / "011.png")
    with pytest.raises(DataError, match=r"011\.png.*pixels"):
        list(from_folder(folder).batches(8, workers=0))


@pytest.mark.parametrize(("wanted", "got"), [(1, 1), (3, 2), (8, 8), (100, 8)])
def test_batches_never_cross_a_shard(wanted, got):
    assert align_batch(wanted) == got


def test_ranks_share_everything_once():
    parts = [World(rank, 4).share(range(9)) for rank in range(4)]
    assert [number for part in parts for number in part] == list(range(9))
    assert [len(World(rank, 4).share([1])) for rank in range(4)] == [0, 0, 0, 1]


@pytest.mark.timeout(240)
def test_two_processes_of_torchrun_print_what_one_prints(folder, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(Path(features.__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    arguments = [
        "-m",
        "varcli",
        "eval",
        str(folder),
        "--ref",
        str(folder),
        "--features",
        "lite0",
        "--json",
        "--no-floor",
    ]
    arguments += ["--cache", str(tmp_path / "cache"), "--device", "cpu"]
    outputs = []
    for start in ([], ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]):
        command = [sys.executable, *start, *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        outputs.append(json.loads(done.stdout))
    assert list((tmp_path / "cache").iterdir())
    assert outputs[0] == outputs[1]
