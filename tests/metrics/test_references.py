"""References: a built file says what its folder says; a named one is fetched once and never another."""

from __future__ import annotations

import json
import shutil
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from PIL import Image
from small_sets import draw, write_pngs
from typer.testing import CliRunner

from varcli.cli.app import app
from varcli.data.emoji import EMOJI64_CLASSES
from varcli.errors import ArtifactError, ConfigError, DataError, IntegrityError, ShapeError
from varcli.metrics import EvalConfig, evaluate, named_references
from varcli.metrics.build_reference import ReferenceConfig, build_reference
from varcli.metrics.named_references import NAMED, REFERENCES_VARIABLE, named_reference
from varcli.metrics.npz import open_npz
from varcli.metrics.reference import default_reference

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
    for garbled in (np.array("{"), np.array("[1]"), np.array([1, 2])):
        np.savez(tmp_path / "other.npz", **{**arrays, "varcli": garbled})
        with pytest.raises(ShapeError, match="no record"):
            evaluated(samples, tmp_path / "other.npz")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--out", "ref.txt"], "must be an npz file"),
        (["--split", "test"], "unknown split"),
        (["--size", "4000"], "mostly smaller"),
        (["--features", "inception"], "not at hand"),
    ],
)
def test_wrong_input_is_one_error_and_leaves_no_file(tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("VARCLI_INCEPTION_WEIGHTS", raising=False)
    write_pngs(tmp_path / "real", draw(4, seed=3))
    done = CliRunner().invoke(app, ["reference", "build", "real", *arguments])
    assert done.exit_code == 1 and words in done.stderr, done.stderr
    assert not list(tmp_path.glob("ref*"))


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture
def tiny_named(tmp_path, monkeypatch):
    """A named reference of small arrays, on a server of this machine."""
    monkeypatch.setattr(named_references, "NUM_IMAGES", 3)
    monkeypatch.setattr(named_references, "NUM_FEATURES", 4)
    monkeypatch.setattr(named_references, "NUM_SPATIAL", 2)
    (tmp_path / "served").mkdir()
    file = tmp_path / "served" / NAMED["imagenet256"].file
    arrays = {"arr_0": np.zeros((3, 256, 256, 3), np.uint8), "mu": np.zeros(4), "sigma": np.eye(4)}
    np.savez(file, **arrays, mu_s=np.zeros(2), sigma_s=np.eye(2))
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=tmp_path / "served"))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv(REFERENCES_VARIABLE, f"http://127.0.0.1:{server.server_address[1]}")
    monkeypatch.setenv("VARCLI_CACHE", str(tmp_path / "cache"))
    yield file
    server.shutdown()
    server.server_close()


def test_a_named_reference_is_fetched_once_and_pinned(tiny_named):
    path = named_reference("imagenet256")
    assert path.read_bytes() == tiny_named.read_bytes()
    tiny_named.unlink()
    assert named_reference("imagenet256") == path


def test_another_file_under_the_name_is_refused(tiny_named):
    path = named_reference("imagenet256")
    path.unlink()
    np.savez(tiny_named, arr_0=np.ones((3, 256, 256, 3), np.uint8))
    with pytest.raises(IntegrityError, match="is expected"):
        named_reference("imagenet256")
    assert not path.exists()


def test_a_file_of_other_arrays_is_not_taken_for_it(tiny_named):
    np.savez(tiny_named, arr_0=np.zeros((3, 256, 256, 3), np.uint8), mu=np.zeros(5), sigma=np.eye(5))
    with pytest.raises(ArtifactError, match="`mu` has shape"):
        named_reference("imagenet256")


def test_a_folder_may_hold_it_and_a_missing_one_says_what_to_do(tiny_named, tmp_path, monkeypatch):
    monkeypatch.setenv(REFERENCES_VARIABLE, str(tiny_named.parent))
    assert named_reference("imagenet256") == tiny_named
    with pytest.raises(ArtifactError, match="holds no VIRTUAL_imagenet512"):
        named_reference("imagenet512")
    monkeypatch.setenv(REFERENCES_VARIABLE, "http://127.0.0.1:9")
    monkeypatch.setattr(named_references, "fetch", partial(named_references.fetch, attempts=1))
    with pytest.raises(ArtifactError, match="cannot fetch") as caught:
        named_reference("imagenet256")
    assert "--ref" in caught.value.hint


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
