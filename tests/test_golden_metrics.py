"""Metrics give the golden scores, at the tolerances of the golden files' README."""

from __future__ import annotations

import golden_eval
import numpy as np
import pytest
import torch

from varcli.metrics import density_coverage, frechet_distance, inception_score, kernel_distance, precision_recall
from varcli.metrics.distances import nearest_radii
from varcli.metrics.fid import frechet_of_statistics
from varcli.metrics.statistics import RunningStatistics

KERNEL_DISTANCES = {  # from the README's table, to its eight digits
    "feat_gauss_512x64": 0.072286476,
    "feat_rankdef_1000x128": 0.018501463,
    "feat_imbalanced_900x96": 0.70590903,
    "feat_lattice_400x24": 37.843214,
    "feat_dup_300x32": -0.0027576507,
    "feat_overflow_256x48": 25904953,
    "feat_blocks_10050x6": 0.99739924,
}


@pytest.fixture(params=golden_eval.CASES)
def case(request) -> golden_eval.FeatureCase:
    return golden_eval.feature_case(request.param)


def test_frechet_distance_is_exact(case):
    distance = frechet_distance(case.reference, case.sample)
    assert distance == pytest.approx(case.scores["fid_exact"], rel=1e-7)
    assert distance == pytest.approx(case.scores["fid_evaluator"], rel=5e-6)


def test_frechet_distance_of_merged_statistics_is_exact(case):
    if case.reference.shape[1] > 1000 and not golden_eval.IS_FULL:
        pytest.skip("ten seconds of eigenvalues; VARCLI_GOLDEN_EVAL runs it")
    parts = []
    for rows in (case.reference, case.sample):
        whole = RunningStatistics()
        for shard in np.array_split(rows, 3):
            part = RunningStatistics()
            for piece in np.array_split(shard, 5):
                part.update(torch.from_numpy(piece))
            whole.merge(part)
        parts.append(whole.finish())
    assert frechet_of_statistics(*parts) == pytest.approx(case.scores["fid_exact"], rel=1e-9)


def test_precision_and_recall_are_exact(case):
    precision, recall = precision_recall(case.reference, case.sample)
    slack = 0 if "lattice" in case.name else 1
    assert abs(precision - case.scores["precision_float64"]) * len(case.sample) <= slack + 1e-6
    assert abs(recall - case.scores["recall_float64"]) * len(case.reference) <= slack + 1e-6


def test_radii_are_exact(case):
    radii = nearest_radii(case.reference, 3)[:64].numpy()
    expected = golden_eval.load(case.name)["radii_sq_ref_first64"]
    assert np.allclose(radii, expected, rtol=1e-9, atol=1e-9)


def test_density_and_coverage_are_exact(case):
    density, coverage = density_coverage(case.reference, case.sample, k=3)
    assert density == pytest.approx(case.scores["density_k3_float64"], abs=1 / len(case.sample))
    assert abs(coverage - case.scores["coverage_k3_float64"]) * len(case.reference) <= 1 + 1e-6


def test_kernel_distance_is_exact(case):
    if case.name not in KERNEL_DISTANCES:
        pytest.skip("no golden value")
    assert kernel_distance(case.reference, case.sample) == pytest.approx(KERNEL_DISTANCES[case.name], rel=1e-7)


def test_inception_score_is_exact_in_every_order():
    arrays = golden_eval.load("is_12000")
    logits = arrays["codes_class_sorted"].astype(np.float32) / 16 @ arrays["W"]
    for order, split_size, key in (
        (arrays["permutation"], 5000, "is_float64_shuffled"),
        (slice(None), 5000, "is_float64_class_sorted"),
        (slice(None), len(logits), "is_float64_single_split"),
    ):
        assert inception_score(logits[order], split_size) == pytest.approx(float(arrays[key]), rel=1e-5)


def test_inception_network_with_formula_weights(tmp_path):
    from varcli.metrics.inception import InceptionExtractor
    from varcli.metrics.inception_network import InceptionNetwork

    golden = golden_eval.load("inception_formula_a")
    weights = golden_eval.formula_weights(InceptionNetwork().state_dict(), int(golden["salt"]))
    assert len(weights) == 566
    total = sum(float(tensor.double().abs().sum()) for tensor in weights.values())
    assert total == pytest.approx(float(golden["weight_abs_sum"]), rel=1e-9)
    torch.save(weights, tmp_path / "weights.pth")
    extractor = InceptionExtractor(tmp_path / "weights.pth", torch.device("cpu"), allow_unknown=True)
    for number, (height, width) in enumerate(golden["sizes_hw"]):
        image = golden_eval.formula_image(number, height, width, int(golden["salt"]))
        assert int(image.sum()) == golden["image_sums"][number]
        features, spatial = extractor.extract(image[None], spatial=True)
        for key, actual in (
            ("pool3", features),
            ("spatial", spatial),
            ("logits_unbiased", extractor.logits(features)),
        ):
            assert np.abs(actual[0].numpy() - golden[key][number]).max() <= 1e-4, key


@pytest.mark.gpu
def test_a_gpu_gives_the_same_scores(case):
    scores = case.scores
    assert frechet_distance(case.reference, case.sample, "cuda") == pytest.approx(scores["fid_exact"], rel=1e-7)
    precision, recall = precision_recall(case.reference, case.sample, device="cuda")
    assert abs(precision - scores["precision_float64"]) * len(case.sample) <= 1 + 1e-6
    assert abs(recall - scores["recall_float64"]) * len(case.reference) <= 1 + 1e-6
    by_cpu = kernel_distance(case.reference, case.sample)
    assert kernel_distance(case.reference, case.sample, "cuda") == pytest.approx(by_cpu, rel=1e-9)
