"""A built reference file says what its folder says, of every image, and stands whole or not at all."""

from __future__ import annotations

import json

import golden_eval
import numpy as np
import pytest
import torch
from PIL import Image
from small_sets import draw, write_pngs
from typer.testing import CliRunner

from varcli.cli.app import app
from varcli.errors import ConfigError, DataError, ShapeError
from varcli.metrics import EvalConfig, evaluate
from varcli.metrics import build_reference as building
from varcli.metrics.build_reference import ReferenceConfig, build_reference
from varcli.metrics.features import choose_extractor, extract_features
from varcli.metrics.npz import STATISTICS_KEYS, open_npz
from varcli.metrics.sources import from_folder

OFFLINE = {"features": "lite0", "device": "cpu"}


def evaluated(samples, reference, **changes):
    return evaluate(samples, EvalConfig(**{**OFFLINE, "reference": str(reference), "floor": False, **changes}))


def test_a_built_file_measures_as_its_folder_does(samples, tmp_path):
    folder = write_pngs(tmp_path / "real", draw(12, seed=3))
    built = build_reference(folder, tmp_path / "ref.npz", ReferenceConfig(**OFFLINE))
    assert (built.num_images, built.num_stored, built.network) == (12, 12, "lite0")
    by_file, by_folder = (evaluated(samples, place).metrics for place in (built.file, folder))
    assert by_file == pytest.approx(by_folder, rel=1e-7)  # few images: one side is factored, the other is not


def test_statistics_are_of_all_images_and_some_are_stored(samples, tmp_path):
    folder = write_pngs(tmp_path / "real", draw(12, seed=3))
    for count in (12, 5):
        build_reference(folder, tmp_path / f"{count}.npz", ReferenceConfig(images=count, **OFFLINE))
    few, all_ = (evaluated(samples, tmp_path / f"{count}.npz", metrics=("fd_lite0", "recall")) for count in (5, 12))
    assert few.metrics["fd_lite0"] == all_.metrics["fd_lite0"]
    with np.load(tmp_path / "5.npz") as stored:
        assert stored["arr_0"].shape[0] == 5
        record = json.loads(str(stored["varcli"]))
    assert (record["images"]["count"], record["stored"]["count"], record["network"]) == (12, 5, "lite0")


@pytest.mark.parametrize("piece", [2**16, 8, 4])
def test_statistics_are_those_of_all_features_however_many_are_held_at_once(tmp_path, monkeypatch, piece):
    folder = write_pngs(tmp_path / "real", draw(11, seed=3), [f"{number:02}.png" for number in range(11)])
    extracted = extract_features(from_folder(folder), choose_extractor("lite0"), batch_size=4)
    features = extracted.features.astype(np.float64)
    monkeypatch.setattr(building, "_PIECE", piece)
    steps, config = [], ReferenceConfig(batch_size=4, **OFFLINE)
    built = build_reference(folder, tmp_path / "ref.npz", config, on_step=steps.append)
    statistics = open_npz(built.file).read_statistics(STATISTICS_KEYS)
    np.testing.assert_allclose(statistics.mean, features.mean(axis=0), rtol=1e-9, atol=1e-12)
    covariance = np.cov(features, rowvar=False)
    assert np.abs(statistics.covariance - covariance).max() <= 1e-9 * np.abs(covariance).max()
    done = [step.done for step in steps]
    assert done[: done.index(11)] == sorted(done[: done.index(11)]) and {step.total for step in steps} == {11}


@pytest.mark.parametrize(("split", "count"), [(None, 12), ("train", 12), ("val", 8), ("all", 20)])
def test_a_split_is_taken_whole_and_as_its_folder_says(samples, real, tmp_path, split, count):
    built = build_reference(real, tmp_path / "ref.npz", ReferenceConfig(split=split, **OFFLINE))
    assert built.num_images == built.num_stored == count
    if split == "val":  # what a folder as the reference takes too
        by_file, by_folder = (evaluated(samples, place).metrics for place in (built.file, real))
        assert by_file == pytest.approx(by_folder, rel=1e-7)


def test_stored_images_are_a_seeded_choice_in_their_order(tmp_path):
    drawn = draw(9, seed=3)
    folder = write_pngs(tmp_path / "real", drawn)
    chosen = {}
    for name, seed in (("first", 0), ("again", 0), ("other", 1)):
        build_reference(folder, tmp_path / f"{name}.npz", ReferenceConfig(images=4, seed=seed, **OFFLINE))
        with np.load(tmp_path / f"{name}.npz") as stored:
            places = [int(np.flatnonzero((drawn == image).all(axis=(1, 2, 3)))[0]) for image in stored["arr_0"]]
        assert places == sorted(set(places))
        chosen[name] = places
    assert (tmp_path / "first.npz").read_bytes() == (tmp_path / "again.npz").read_bytes()
    assert chosen["first"] != chosen["other"]


def test_the_record_says_what_made_the_file_but_not_where(tmp_path):
    folder = write_pngs(tmp_path / "real", draw(4, seed=3))
    built = build_reference(folder, tmp_path / "ref.npz", ReferenceConfig(**OFFLINE))
    record = open_npz(built.file).read_record()
    shown = {"path": "real", "split": "train", "count": 4, "height": 32, "width": 32, "preparation": "as they are"}
    assert record["images"] == shown
    assert set(record["versions"]) == {"varcli", "torch", "numpy", "pillow"}
    assert len(record["content"]) == len(record["weights_sha256"]) == 64
    assert str(tmp_path) not in json.dumps(record)
    write_pngs(folder, draw(1, seed=4))  # one image becomes another
    build_reference(folder, tmp_path / "ref.npz", ReferenceConfig(**OFFLINE))
    assert open_npz(built.file).read_record()["content"] != record["content"]


def test_inception_files_hold_spatial_statistics_too(tmp_path):
    from varcli.metrics.inception_network import InceptionNetwork

    weights = tmp_path / "weights.pth"
    torch.save(golden_eval.formula_weights(InceptionNetwork().state_dict()), weights)
    own = {"features": "inception", "inception_weights": weights, "allow_unknown_weights": True, "device": "cpu"}
    folder = write_pngs(tmp_path / "real", draw(3, seed=3))
    file = build_reference(folder, tmp_path / "ref.npz", ReferenceConfig(**own)).file
    headers = open_npz(file).headers
    shapes = {"arr_0": (3, 32, 32, 3), "mu": (2048,), "sigma": (2048, 2048), "mu_s": (2023,), "sigma_s": (2023, 2023)}
    assert {key: headers[key][0] for key in shapes} == shapes
    assert {headers[key][1] for key in shapes if key != "arr_0"} == {np.dtype(np.float64)}


@pytest.mark.parametrize("moment", ["reading", "storing"])
def test_a_stopped_build_leaves_what_was_there(tmp_path, moment):
    folder = write_pngs(tmp_path / "real", draw(4, seed=3))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "ref.npz").write_bytes(b"older")

    def stop(step):
        if moment == "reading" and step.done:
            raise KeyboardInterrupt
        if step.message == "storing images":
            (folder / "3.png").write_bytes(b"no image any more")

    with pytest.raises(KeyboardInterrupt if moment == "reading" else DataError):
        build_reference(folder, tmp_path / "out" / "ref.npz", ReferenceConfig(**OFFLINE), on_step=stop)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["ref.npz"]
    assert (tmp_path / "out" / "ref.npz").read_bytes() == b"older"


def test_larger_images_are_cut_and_sizes_that_differ_ask_for_one(tmp_path):
    folder = tmp_path / "real"
    folder.mkdir()
    for number in range(4):
        Image.new("RGB", (80 + number, 70)).save(folder / f"{number}.png")
    with pytest.raises(ConfigError, match="size must be given"):
        build_reference(folder, tmp_path / "ref.npz", ReferenceConfig(**OFFLINE))
    build_reference(folder, tmp_path / "ref.npz", ReferenceConfig(size=32, **OFFLINE))
    assert open_npz(tmp_path / "ref.npz").image_shape == (4, 32, 32)


def test_a_file_of_other_features_is_refused(samples, tmp_path):
    built = build_reference(
        write_pngs(tmp_path / "real", draw(6, seed=3)), tmp_path / "ref.npz", ReferenceConfig(**OFFLINE)
    )
    arrays = dict(np.load(built.file))
    for change in ({"network": "inception"}, {"weights_sha256": "0" * 64}):
        record = {**json.loads(str(arrays["varcli"])), **change}
        np.savez(tmp_path / "other.npz", **{**arrays, "varcli": np.array(json.dumps(record))})
        with pytest.raises(DataError, match="those in use"):
            evaluated(samples, tmp_path / "other.npz")
    texts = ("{", "[1]", "[" * 100_000, '{"images": 3}', '{"images": {"count": "x"}}', '{"network": null}')
    for garbled in (*map(np.array, texts), np.array([1, 2])):
        np.savez(tmp_path / "other.npz", **{**arrays, "varcli": garbled})
        with pytest.raises(ShapeError, match="no record"):
            evaluated(samples, tmp_path / "other.npz")


def test_the_command_builds_a_file_and_says_how_to_use_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_pngs(tmp_path / "real", draw(4, seed=3))
    arguments = ["reference", "build", "real", "--features", "lite0", "--device", "cpu", "--images", "3"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.stderr
    assert "statistics of 4 images of 32 px in lite0 features" in done.stdout
    assert "varcli eval SAMPLES --ref ref.npz" in done.stderr
    value = json.loads(CliRunner().invoke(app, [*arguments, "--out", "other.npz", "--json"]).stdout)
    assert value == {"file": "other.npz", "images": 4, "stored": 3, "size": 32, "features": "lite0"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--out", "ref.txt"], "must be an npz file"),
        (["--out", "folder.npz"], "must be an npz file"),
        (["--split", "test"], "unknown split"),
        (["--size", "4000"], "mostly smaller"),
        (["--features", "inception"], "not at hand"),
    ],
)
def test_wrong_input_is_one_error_and_leaves_no_file(tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("VARCLI_INCEPTION_WEIGHTS", raising=False)
    write_pngs(tmp_path / "real", draw(4, seed=3))
    (tmp_path / "folder.npz").mkdir()
    done = CliRunner().invoke(app, ["reference", "build", "real", *arguments])
    assert done.exit_code == 1 and words in done.stderr, done.stderr
    assert not list(tmp_path.glob("ref*"))


def test_one_image_has_no_covariance(tmp_path):
    with pytest.raises(DataError, match="at least 2"):
        build_reference(
            write_pngs(tmp_path / "real", draw(1, seed=3)), tmp_path / "ref.npz", ReferenceConfig(**OFFLINE)
        )
