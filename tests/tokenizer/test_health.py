"""Codebook usage numbers, and restarts of codes nobody picks."""

from __future__ import annotations

import pytest
import torch

from varcli.scales import PatchNums
from varcli.tokenizer.health import codebook_report, count_codes, restart_dead_codes


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
