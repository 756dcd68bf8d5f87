"""Near copies are told from images that only resemble each other, and neighbours are the true ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small_sets import draw

from varcli.metrics.nearest import find_near_copies, find_neighbours, nearest_rows
from varcli.metrics.sources import from_tensor

RNG = np.random.default_rng(0)
REAL = RNG.normal(size=(300, 32)).astype(np.float32)
SAMPLES = RNG.normal(size=(240, 32)).astype(np.float32)


def test_nearest_rows_are_those_of_a_full_sort(monkeypatch):
    monkeypatch.setattr("varcli.metrics.nearest._BLOCK", 64)
    places, distances = nearest_rows(SAMPLES, REAL, 5)
    full = np.linalg.norm(SAMPLES[:, None].astype(float) - REAL[None], axis=2)
    assert np.array_equal(places, np.argsort(full, axis=1)[:, :5])
    assert distances == pytest.approx(np.sort(full, axis=1)[:, :5], rel=1e-6)
    assert nearest_rows(SAMPLES, REAL[:3], 5)[0].shape == (240, 3)


def test_independent_sets_hold_no_near_copies():
    found = find_near_copies(SAMPLES, REAL)
    assert found.among_samples == found.among_real == found.in_place == 0
    assert found.to_real == pytest.approx(1, abs=0.1)


def test_images_drawn_twice_with_slight_noise_are_seen():
    twice = np.concatenate([SAMPLES, SAMPLES[:120] + RNG.normal(scale=0.01, size=(120, 32)).astype(np.float32)])
    assert find_near_copies(twice, REAL).among_samples == pytest.approx(240 / 360, abs=0.01)


def test_exact_copies_are_left_to_the_count_of_pixels():
    twice = np.concatenate([SAMPLES, SAMPLES, SAMPLES])
    assert find_near_copies(twice, REAL).among_samples == 0
    assert find_near_copies(np.ones_like(SAMPLES), np.ones_like(REAL)).to_real == 1


def test_copies_and_reconstructions_of_the_reference_are_seen():
    assert find_near_copies(REAL, REAL).in_place == 1
    rebuilt = REAL + RNG.normal(scale=0.5, size=REAL.shape).astype(np.float32)
    assert find_near_copies(rebuilt, REAL).in_place > 0.9
    shuffled = find_near_copies(rebuilt[RNG.permutation(300)[:200]], REAL)
    assert shuffled.in_place == 0 and shuffled.to_real < 0.7


def test_a_few_images_say_nothing():
    assert find_near_copies(SAMPLES[:20], REAL) is None


def test_neighbours_show_the_images_of_their_rows():
    pictures = torch.from_numpy(draw(8, seed=1)).permute(0, 3, 1, 2)
    source, rows = from_tensor(pictures), np.arange(8, dtype=np.float32)[:, None] ** 2
    found = find_neighbours(source, rows, source, rows, 3, "cpu")
    assert len(found) == 3
    assert np.array_equal(found[1].sample, pictures[3].numpy())
    assert [entry.distances[0] for entry in found] == [0, 0, 0]
    assert np.array_equal(found[0].nearest[1], pictures[1].numpy()) and found[0].distances[1] == 1
    assert len(found[0].nearest) == 5
    assert len(find_neighbours(source, rows, source, rows[:2], 1, "cpu")[0].nearest) == 2
