"""What is worked out before a run starts: how a batch is cut, and what to change when memory runs out."""

from __future__ import annotations

import pytest
import torch

from varcli.training import plan
from varcli.training.plan import fit_micro_batch, memory_hint


@pytest.mark.parametrize(
    ("batch_size", "fitting", "expected"),
    [(768, 1000, 768), (768, 400, 384), (768, 250, 192), (768, 0.5, 1), (7, 5, 5), (1, 9, 1)],
)
def test_a_batch_is_cut_into_the_largest_equal_pieces_that_fit(monkeypatch, batch_size, fitting, expected):
    monkeypatch.setattr(plan, "free_bytes", lambda device: 100 + fitting * 10 / 0.85 + 1e-6)
    assert fit_micro_batch(batch_size, 10, 85, torch.device("cpu")) == expected


def test_the_flag_to_change_is_named_and_fits_what_was_tried():
    assert "--set micro_batch_size=24" in memory_hint(48, "bf16")
    assert "--precision" not in memory_hint(48, "bf16")
    assert memory_hint(3, "fp32").startswith("--set micro_batch_size=1 ")
    assert "--precision bf16" in memory_hint(1, "fp32")
    assert "smaller --depth" in memory_hint(1, "bf16")
