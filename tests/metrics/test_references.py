"""References: a built file says what its folder says; a named one is fetched once and never another."""

from __future__ import annotations

import io
import json
import shutil
from functools import partial

import numpy as np
import pytest
from dropping_server import run_server
from PIL import Image
from small_sets import draw, write_pngs
from typer.testing import CliRunner

from varcli.artifacts.lock import lock_folder
from varcli.cli.app import app
from varcli.data.emoji import EMOJI64_CLASSES
from varcli.errors import ArtifactError, ConfigError, DataError, IntegrityError, ShapeError
from varcli.metrics import EvalConfig, evaluate, named_references
from varcli.metrics import build_reference as building
from varcli.metrics.build_reference import ReferenceConfig, build_reference
from varcli.metrics.features import choose_extractor, extract_features
from varcli.metrics.named_references import NAMED, REFERENCES_VARIABLE, named_reference
from varcli.metrics.npz import STATISTICS_KEYS, open_npz
from varcli.metrics.reference import default_reference
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


@pytest.mark.parametrize("piece", [50_000, 5, 1])
def test_statistics_are_those_of_all_features_however_many_are_held_at_once(tmp_path, monkeypatch, piece):
    folder = write_pngs(tmp_path / "real", draw(11, seed=3), [f"{number:02}.png" for number in range(11)])
    features = extract_features(from_folder(folder), choose_extractor("lite0")).features.astype(np.float64)
    monkeypatch.setattr(building, "_PIECE", piece)
    steps = []
    built = build_reference(folder, tmp_path / "ref.npz", ReferenceConfig(**OFFLINE), on_step=steps.append)
    statistics = open_npz(built.file).read_statistics(STATISTICS_KEYS)
    np.testing.assert_allclose(statistics.mean, features.mean(axis=0), rtol=1e-9, atol=1e-7)
    covariance = np.cov(features, rowvar=False)
    # another batch size moves a float32 feature by its last digit, so only equal batches agree to more
    assert np.abs(statistics.covariance - covariance).max() <= (1e-9 if piece > 11 else 1e-5) * np.abs(covariance).max()
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


@pytest.mark.parametrize("moment", ["reading", "storing"])
def test_a_stopped_build_leaves_what_was_there(tmp_path, moment):
    folder = write_pngs(tmp_path / "real", draw(4, seed=3))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "ref.npz").write_bytes(b"older")
    if moment == "storing":
        (folder / "0.png").rename(folder / "moved.png")

    def stop(step):
        if (moment == "reading" and step.done) or step.message == "storing images":
            if moment == "reading":
                raise KeyboardInterrupt
            (folder / "moved.png").write_bytes(b"broken while the file is written")

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


ARRAYS = {
    "arr_0": np.random.default_rng(0).integers(0, 256, (3, 256, 256, 3), dtype=np.uint8),
    "mu": np.zeros(4), "sigma": np.eye(4), "mu_s": np.zeros(2), "sigma_s": np.eye(2),
}


def as_npz(**changes) -> bytes:
    arrays = {key: array for key, array in {**ARRAYS, **changes}.items() if array is not None}
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


@pytest.fixture
def tiny_named(tmp_path, monkeypatch):
    """A server of this machine with a named reference of small arrays."""
    monkeypatch.setattr(named_references, "_NUM_IMAGES", 3)
    monkeypatch.setattr(named_references, "_NUM_FEATURES", 4)
    monkeypatch.setattr(named_references, "_NUM_SPATIAL", 2)
    monkeypatch.setattr(named_references, "fetch", partial(named_references.fetch, attempts=2, pause=0))
    with run_server(as_npz()) as server:
        monkeypatch.setenv(REFERENCES_VARIABLE, server.address)
        monkeypatch.setenv("VARCLI_CACHE", str(tmp_path / "cache"))
        yield server


def test_a_named_reference_is_fetched_once_and_pinned(tiny_named):
    path = named_reference("imagenet256")
    assert path.read_bytes() == tiny_named.content
    assert named_reference("imagenet256") == path
    assert tiny_named.paths == ["/VIRTUAL_imagenet256_labeled.npz"]


def test_dropped_connections_do_not_change_what_arrives(tiny_named):
    tiny_named.cut = 150_000
    path = named_reference("imagenet256")
    assert path.read_bytes() == tiny_named.content
    assert tiny_named.requests[1:3] == ["bytes=150000-", "bytes=300000-"]
    assert not list(path.parent.glob("*.part*"))


def test_another_file_under_the_name_is_refused(tiny_named):
    path = named_reference("imagenet256")
    path.unlink()
    tiny_named.content = as_npz(mu=np.ones(4))
    with pytest.raises(IntegrityError, match="is expected"):
        named_reference("imagenet256")
    assert not path.exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"<html>please log in</html>", "not a whole npz file"),
        (as_npz()[:-500], "not a whole npz file"),
        (as_npz(mu=np.zeros(5)), r"`mu` is float64 of shape \(5,\)"),
        (as_npz(mu=np.zeros(4, int)), "`mu` is int64"),
        (as_npz(sigma_s=None), "`sigma_s` is missing"),
        (as_npz(arr_0=np.zeros((2, 256, 256, 3), np.uint8)), "`arr_0` is uint8 of shape"),
        (as_npz(arr_0=np.zeros((3, 256, 256, 3), np.float32)), "`arr_0` is float32"),
    ],
)
def test_what_is_not_the_file_is_not_pinned_as_it(tiny_named, content, words):
    tiny_named.content = content
    with pytest.raises(ArtifactError, match=words) as caught:
        named_reference("imagenet256")
    assert "--ref" in caught.value.hint
    tiny_named.content = as_npz()
    assert named_reference("imagenet256").read_bytes() == as_npz()


def test_a_folder_may_hold_it_and_a_missing_one_says_what_to_do(tiny_named, tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    file = tmp_path / "mine" / NAMED["imagenet256"].file
    file.write_bytes(as_npz())
    monkeypatch.setenv(REFERENCES_VARIABLE, str(file.parent))
    assert named_reference("imagenet256") == file
    with pytest.raises(ArtifactError, match="holds no VIRTUAL_imagenet512"):
        named_reference("imagenet512")
    file.write_bytes(as_npz(mu=None))
    with pytest.raises(ArtifactError, match="`mu` is missing"):
        named_reference("imagenet256")
    assert not tiny_named.requests


def test_without_a_network_the_error_says_which_file_goes_where(tiny_named, tmp_path, monkeypatch):
    monkeypatch.setenv(REFERENCES_VARIABLE, "http://127.0.0.1:9/mirror/")
    with pytest.raises(ArtifactError, match="cannot fetch") as caught:
        named_reference("imagenet256")
    place = tmp_path / "cache" / "references" / NAMED["imagenet256"].file
    for words in (f"http://127.0.0.1:9/mirror/{place.name}", str(place), "--ref"):
        assert words in caught.value.hint
    place.write_bytes(as_npz())  # as the hint says
    assert named_reference("imagenet256") == place


def test_two_evaluations_can_begin_at_once(tiny_named):
    path = named_reference("imagenet256")
    with lock_folder(path.parent):
        assert named_reference("imagenet256") == path


def test_eval_says_which_reference_it_chose_and_fetches_none_that_the_features_cannot_use(tiny_named, tmp_path):
    samples = write_pngs(tmp_path / "samples", draw(3, seed=1, side=256))
    done = CliRunner().invoke(app, ["eval", str(samples), "--features", "lite0", "--device", "cpu"])
    assert done.exit_code == 1
    assert "reference: imagenet256" in done.stderr.splitlines()
    assert "statistics of Inception features" in done.stderr and "--inception-weights" in done.stderr
    assert not tiny_named.requests


def test_a_misspelt_name_is_answered_with_the_nearest(samples):
    with pytest.raises(ArtifactError, match="no reference") as caught:
        evaluated(samples, "imagnet512")
    assert "did you mean imagenet512?" in caught.value.hint


def test_the_default_is_what_is_recorded_else_imagenet_at_their_size(tmp_path):
    assert default_reference({"reference": str(tmp_path)}, (64, 64)) == str(tmp_path)
    assert default_reference({"reference": "gone", "classes": list(EMOJI64_CLASSES)}) == "emoji64"
    assert default_reference(None, (256, 256)) == "imagenet256"
    assert default_reference({"classes": ["x"] * 1000}, (512, 512)) == "imagenet512"
    for info, side in ((None, (64, 64)), ({"classes": ["a", "b"]}, (256, 256)), (None, (256, 512))):
        with pytest.raises(ConfigError, match="which real images"):
            default_reference(info, side)


def test_samples_know_the_images_their_model_learned_from(tiny_tokenizer, tiny_images, tmp_path, monkeypatch):
    from varcli.data.codes import CodesCache
    from varcli.tokenizer.encode import tokenize
    from varcli.tokenizer.store import save_tokenizer

    monkeypatch.chdir(tmp_path)
    save_tokenizer(tmp_path / "tokenizer", tiny_tokenizer)
    tokenize(tiny_images, tmp_path / "codes", tmp_path / "tokenizer", workers=0, device="cpu")
    assert CodesCache.open(tmp_path / "codes").info["source"] == str(tiny_images)
    shutil.rmtree(tmp_path / "codes")
