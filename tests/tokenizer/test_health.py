"""Codebook usage numbers, and restarts of codes nobody picks."""

from __future__ import annotations

import pytest
import torch

from varcli.scales import PatchNums
from varcli.tokenizer.health import codebook_report, count_codes, find_collapse, restart_dead_codes


def test_counts_are_kept_per_scale():
    counts = count_codes(torch.tensor([[3, 0, 0, 1, 2], [3, 0, 0, 0, 0]]), PatchNums((1, 2)), vocab_size=4)
    assert counts.tolist() == [[0, 0, 0, 2], [6, 1, 1, 0]]


def test_perplexity_is_the_number_of_equally_used_codes():
    report = codebook_report(torch.tensor([[5.0, 5, 0, 0], [2, 2, 2, 2]]))
    assert report["perplexity_scale_0"] == pytest.approx(2)
    assert report["perplexity_scale_1"] == pytest.approx(4)
    assert report["codebook_used_scale_0"] == 0.5
    assert report["codebook_used"] == 1.0


def test_restarted_codes_are_vectors_of_the_batch_and_others_stay(tiny_tokenizer):
    quantizer = tiny_tokenizer.quantizer
    features = torch.randn(4, 8, 4, 4)
    before = quantizer.codebook.weight.detach().clone()
    candidates = torch.cat(quantizer.leftovers(features))
    dead = torch.zeros(16, dtype=torch.bool)
    dead[[1, 5, 9]] = True
    moved = restart_dead_codes(quantizer, features, dead, torch.Generator().manual_seed(0))
    assert moved.tolist() == [1, 5, 9]
    after = quantizer.codebook.weight.detach()
    assert torch.equal(after[~dead], before[~dead])
    assert all((candidates == vector).all(dim=1).any() for vector in after[dead])


def report(perplexities: list[float], used: float = 1.0) -> dict[str, float]:
    scales = {f"perplexity_scale_{number}": value for number, value in enumerate(perplexities)}
    return {"codebook_used": used, **scales}


def test_a_scale_below_two_codes_or_a_hundredth_of_its_codes_has_collapsed():
    scales = PatchNums((1, 2, 4))
    assert find_collapse(report([12.0, 30.0, 400.0]), scales, 1000, 1000) == {}
    found = find_collapse(report([1.3, 9.0, 400.0]), scales, 1000, 1000)
    assert list(found) == [0, 1]
    assert "the 1x1 scale has collapsed: its 1,000 picks are worth 1.3 of 1,000 codes" in found[0]
    # 100 picks cannot be worth more than 100 codes, so a hundredth of 4,096 is not asked of them
    assert find_collapse(report([3.0, 50.0, 400.0]), scales, 4096, 100) == {}


def test_a_codebook_of_which_less_than_thirty_percent_is_used_is_named():
    scales = PatchNums((1, 2, 4))
    assert "29% of its 64 codes" in find_collapse(report([40, 40, 40], 0.29), scales, 64, 1000)[None]
    assert find_collapse(report([40, 40, 40], 0.3), scales, 64, 1000) == {}


def test_few_images_are_not_taken_for_a_collapse():
    scales = PatchNums((1, 2, 4))
    # 6 pictures pick 6 codes at the 1x1 scale at most, and 126 in all of a codebook of 4,096
    assert find_collapse(report([1.0, 3.0, 60.0], 0.01), scales, 4096, 6) == {}


def test_leftovers_that_are_no_numbers_do_not_reach_the_codebook(tiny_tokenizer):
    quantizer = tiny_tokenizer.quantizer
    before = quantizer.codebook.weight.detach().clone()
    features = torch.full((2, 8, 4, 4), float("nan"))
    restart_dead_codes(quantizer, features, torch.ones(16, dtype=torch.bool), torch.Generator().manual_seed(0))
    assert torch.equal(quantizer.codebook.weight.detach(), before)
