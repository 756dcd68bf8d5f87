"""The whole evaluation on small sets: what it says, what it refuses, and that it repeats."""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import replace

import golden_eval
import numpy as np
import pytest
import torch
from PIL import Image
from small_sets import draw, write_pngs

from varcli.data.emoji import EMOJI64_CLASSES
from varcli.data.samples import SamplesWriter
from varcli.errors import ArtifactError, ConfigError, DataError, NumericError, ShapeError
from varcli.metrics import EvalConfig, FeatureSet, compute_metrics, evaluate, frechet_distance, precision_recall
from varcli.metrics.features import choose_extractor, extract_features
from varcli.metrics.inception import WEIGHTS_VARIABLE
from varcli.metrics.reference import default_reference, open_reference
from varcli.metrics.samples import open_samples
from varcli.metrics.sources import from_tensor


@pytest.fixture(autouse=True)
def _no_inception(monkeypatch, tmp_path):
    """As on a machine where the Inception weights never arrived."""
    monkeypatch.delenv(WEIGHTS_VARIABLE, raising=False)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))


def offline(**changes) -> EvalConfig:
    return EvalConfig(**{"features": "lite0", "device": "cpu", **changes})


def test_the_result_holds_numbers_floor_and_what_they_stand_for(samples, real):
    result = evaluate(samples, offline(reference=str(real)))
    value = json.loads(json.dumps(result.to_json()))
    names = ["kid_lite0", "precision_lite0", "recall_lite0", "fd_lite0", "is_lite0"]
    assert list(result.metrics) == names
    assert [name for name in value["floor"] if name != "images"] == names
    assert value["samples"]["count"] == 10
    assert value["reference"]["count"] == 8
    assert value["reference"]["path"].endswith("real, val images")
    assert result.floor_images.startswith("10 of") and result.floor_images.endswith("train images")
    assert "these numbers are not FID" in value["warnings"][0]
    assert any("few for 1280 features" in warning for warning in value["warnings"])
    assert len(value["features"]["weights_sha256"]) == 64


def test_it_repeats_exactly(samples, real):
    first, second = (evaluate(samples, offline(reference=str(real))) for _ in range(2))
    assert first == second


def test_a_folder_an_archive_and_a_tensor_give_the_same(samples, real, tmp_path):
    images = draw(10, seed=1)
    np.savez(tmp_path / "samples.npz", arr_0=images)
    config = offline(reference=str(real), metrics=("kid", "recall"), floor=False)
    in_memory = torch.from_numpy(images).permute(0, 3, 1, 2)
    values = [evaluate(given, config).metrics for given in (samples, tmp_path / "samples.npz", in_memory)]
    assert list(values[0]) == ["kid_lite0", "recall_lite0"]
    for other in values[1:]:
        assert other == pytest.approx(values[0], rel=1e-6)


def test_real_images_measured_against_themselves_are_perfect(real):
    values = evaluate(real / "val", offline(reference=str(real / "val"), metrics=("fd_lite0", "precision", "recall")))
    assert values.metrics["fd_lite0"] == pytest.approx(0, abs=1e-6)
    assert values.metrics["precision_lite0"] == values.metrics["recall_lite0"] == 1
    assert values.floor_images == "one half of the reference (4 images) against the other"


def test_the_inception_score_alone_needs_no_reference(samples):
    result = evaluate(samples, offline(metrics=("inception_score",)))
    assert list(result.metrics) == ["is_lite0"]
    assert result.reference is None and result.floor == {}


def test_too_few_images_skip_what_they_cannot_give(tmp_path, real):
    few = write_pngs(tmp_path / "few", draw(3, seed=5))
    result = evaluate(few, offline(reference=str(real)))
    assert set(result.skipped) == {"precision_lite0", "recall_lite0"}
    assert result.skipped["recall_lite0"] == "it takes at least 4 images, but 3 of the samples are known"
    assert "kid_lite0" in result.metrics
    one = write_pngs(tmp_path / "one", draw(1, seed=5))
    with pytest.raises(DataError, match="not one metric can be computed"):
        evaluate(one, offline(reference=str(real), metrics=("kid",)))


def test_copies_and_jpegs_are_told(tmp_path, real):
    folder = write_pngs(tmp_path / "samples", np.concatenate([draw(4, seed=1), draw(2, seed=1)]))
    Image.fromarray(draw(1, seed=9)[0]).save(folder / "9.jpg")
    found = evaluate(folder, offline(reference=str(real), floor=False)).warnings
    assert any(warning.startswith("4 samples are exact copies") for warning in found)
    assert any(warning.startswith("1 of 7 samples are JPEG") for warning in found)


def test_the_reference_is_the_one_the_samples_name(tmp_path, real):
    with SamplesWriter(tmp_path / "samples", {"seed": 0}) as writer:
        pairs = [(0, number) for number in range(6)] + [(1, 0)]
        for pair, image in zip(pairs, draw(7, seed=1).transpose(0, 3, 1, 2)):
            writer.write(*pair, image)
        writer.finish(pairs, {"classes": ["ant", "bee"], "reference": str(real)})
    result = evaluate(tmp_path / "samples", offline(metrics=("kid",)))
    assert result.reference["path"] == f"{real}, val images"
    assert any("36% of the images" in warning for warning in result.warnings)
    # floor images follow the samples' classes as far as there are enough
    assert result.floor_images.startswith("7 of")


def test_samples_that_name_no_reference_ask_for_one(samples):
    with pytest.raises(ConfigError, match="do not say which real images"):
        evaluate(samples, offline())


def test_a_recorded_reference_that_moved_is_told():
    with pytest.raises(ConfigError, match="which are not there"):
        default_reference({"reference": "elsewhere/images"})
    assert default_reference({"classes": list(EMOJI64_CLASSES)}) == default_reference({"reference": "emoji64"})


def test_emoji64_is_a_reference_by_name(tmp_path):
    folder = write_pngs(tmp_path / "samples", draw(4, seed=1, side=64))
    images = open_samples(folder, ExitStack())
    with ExitStack() as stack:
        reference = open_reference("emoji64", images.side, stack)
        assert reference.shown == "emoji64, val images"
        assert reference.images.count == 535
        assert len(next(iter(reference.images.batches(4)))) == 4


def test_stored_statistics_take_the_place_of_images(tmp_path, samples, real):
    extractor = choose_extractor("lite0")
    drawn = draw(20, seed=3)
    found = extract_features(from_tensor(torch.from_numpy(drawn).permute(0, 3, 1, 2)), extractor)
    mean, covariance = found.features.mean(axis=0, dtype=np.float64), np.cov(found.features, rowvar=False)
    np.savez(tmp_path / "ref.npz", mu=mean, sigma=covariance)
    result = evaluate(samples, offline(reference=str(tmp_path / "ref.npz")))
    assert result.skipped["recall_lite0"] == "no features of the reference are known"
    sampled = extract_features(open_samples(samples, ExitStack()).images, extractor).features
    assert result.metrics["fd_lite0"] == pytest.approx(frechet_distance(found.features, sampled), rel=1e-6)
    np.savez(tmp_path / "both.npz", mu=mean, sigma=covariance, arr_0=drawn)
    assert not evaluate(samples, offline(reference=str(tmp_path / "both.npz"))).skipped
    np.savez(tmp_path / "other.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    with pytest.raises(DataError, match="statistics of 2048 features"):
        evaluate(samples, offline(reference=str(tmp_path / "other.npz")))


def test_another_size_is_refused(tmp_path, samples):
    np.savez(tmp_path / "ref.npz", arr_0=draw(5, seed=0, side=16))
    with pytest.raises(DataError, match="16 x 16 pixels, but the samples are 32 x 32"):
        evaluate(samples, offline(reference=str(tmp_path / "ref.npz")))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"metrics": ("fid",)}, ConfigError, "`fid` is a distance between Inception features"),
        ({"metrics": ("fidd",)}, ConfigError, "unknown metric `fidd`"),
        ({"features": "vgg"}, ConfigError, "unknown feature network `vgg`"),
        ({"features": "inception"}, ArtifactError, "weights are not at hand"),
        ({"reference": "nowhere"}, ArtifactError, "there is no reference `nowhere`"),
        ({"features": "auto", "inception_weights": "nowhere"}, ArtifactError, "which is not a file"),
    ],
)
def test_wrong_settings_are_one_error_with_a_hint(samples, real, changes, error, message):
    with pytest.raises(error, match=message) as caught:
        evaluate(samples, offline(**{"reference": str(real), **changes}))
    assert caught.value.hint or "not a file" in message


def test_missing_samples_are_one_error(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.txt").write_text("no images")
    for path, message in (("none", "there are no samples"), ("empty", "holds no images"), ("text.txt", "is a file")):
        with pytest.raises((ArtifactError, DataError), match=message):
            evaluate(tmp_path / path, offline(reference="emoji64"))


def test_features_that_are_not_numbers_stop_it(samples):
    extractor = choose_extractor("lite0")
    extractor.network.head.conv.bias[0] = torch.nan
    with pytest.raises(NumericError):
        extract_features(open_samples(samples, ExitStack()).images, extractor)


def test_inception_gives_the_names_of_papers(tmp_path, samples, real):
    from varcli.metrics.inception_network import InceptionNetwork

    weights = tmp_path / "weights.pth"
    torch.save(golden_eval.formula_weights(InceptionNetwork().state_dict()), weights)
    config = EvalConfig(reference=str(real), inception_weights=weights, device="cpu", floor=False)
    with pytest.raises(ArtifactError, match="not the Inception file of published FIDs"):
        evaluate(samples, config)
    result = evaluate(samples, EvalConfig(**{**vars(config), "allow_unknown_weights": True}))
    assert list(result.metrics) == ["fid", "sfid", "inception_score", "precision", "recall"]
    assert "not the published ones" in result.warnings[0]


class TestComputeMetrics:
    """The function that other tools call."""

    features = np.random.default_rng(0).normal(size=(30, 5))
    others = np.random.default_rng(1).normal(size=(20, 5))

    def test_arrays_of_features_are_enough(self):
        values = compute_metrics(self.features, self.others, ["fid", "recall", "precision"])
        precision, recall = precision_recall(self.others, self.features)
        assert values == {
            "fid": pytest.approx(frechet_distance(self.others, self.features)),
            "recall": recall,
            "precision": precision,
        }

    def test_what_cannot_be_computed_is_an_error_if_it_was_asked_for(self):
        with pytest.raises(DataError, match="no class logits of the samples are known"):
            compute_metrics(self.features, self.others, ["inception_score"])
        assert list(compute_metrics(self.features, self.others)) == ["fid", "precision", "recall"]

    def test_sets_may_hold_logits(self):
        logits = np.eye(4) * 1000
        assert compute_metrics(FeatureSet(logits=logits), None, ["inception_score"]) == {
            "inception_score": pytest.approx(4)
        }

    def test_paths_are_read(self, samples, real):
        values = compute_metrics(str(samples), real, ["kid"], features="lite0")
        assert list(values) == ["kid_lite0"]

    def test_paths_and_arrays_do_not_mix(self, samples):
        with pytest.raises(ShapeError):
            compute_metrics(self.features, samples, ["kid"])


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["lite0", "inception"])
def test_features_of_a_gpu_are_those_of_the_cpu(name, tmp_path):
    weights = None
    if name == "inception":
        pytest.importorskip("torch_fidelity")
        from varcli.metrics.inception_network import InceptionNetwork

        weights = tmp_path / "weights.pth"
        torch.save(golden_eval.formula_weights(InceptionNetwork().state_dict()), weights)
    source = from_tensor(torch.from_numpy(draw(8, seed=1, side=64)).permute(0, 3, 1, 2))
    by_device = [
        extract_features(source, choose_extractor(name, weights, device, allow_unknown_weights=True), True)
        for device in ("cpu", "cuda")
    ]
    for part in ("features", "logits", *(["spatial"] if weights else [])):
        on_cpu, on_gpu = (getattr(found, part) for found in by_device)
        assert np.abs(on_cpu - on_gpu).max() <= 1e-3, part


def test_an_iterator_of_batches_gives_the_numbers_of_its_images(tmp_path):
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (24, 3, 32, 32), dtype=np.uint8))
    config = EvalConfig(features="lite0", device="cpu", metrics=("precision", "inception_score"), floor=False)
    reference = tmp_path / "reference.npz"
    np.savez(reference, arr_0=images.numpy()[::-1].transpose(0, 2, 3, 1).copy())
    config = replace(config, reference=str(reference))
    streamed = evaluate(iter(images.split(7)), config)
    assert streamed.metrics == evaluate(images, config).metrics
    assert streamed.samples["count"] == 24
    with pytest.raises(ShapeError, match="no images"):
        evaluate(iter(()), config)
    with pytest.raises(ShapeError, match="one size"):
        evaluate(iter([images, images[..., :16]]), config)
    with pytest.raises(ShapeError, match="uint8"):
        evaluate(iter([images.float()]), config)
