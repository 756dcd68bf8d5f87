"""What torch.compile made of training stays in use, however many sizes of micro-batch are tried out.

Torch keeps eight programs of a function, here two, and then runs it uncompiled, with no more than a warning.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from toy_runs import TINY, make_trainer

from varcli.training.objective import Objective

CONFIG = replace(TINY, depth=1, width=16, batch_size=8, micro_batch_size=None, dropout=0.0, drop_path=0.0, compile=True)


@pytest.fixture
def runs(monkeypatch) -> Iterator[list[int]]:
    """Let torch.compile trace, but generate no code; what comes is extended whenever a traced program runs."""
    found: list[int] = []

    def backend(graph, inputs):
        return lambda *given: (found.append(1), graph(*given))[1]

    right = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda function, **options: right(function, **{**options, "backend": backend})
    )
    torch.compiler.reset()
    with torch._dynamo.config.patch(recompile_limit=2):
        yield found
    torch.compiler.reset()


def test_every_size_of_micro_batch_is_compiled(codes, tokenizer_folder, monkeypatch, runs):
    monkeypatch.setattr("varcli.training.prepare._CALIBRATION_IMAGES", CONFIG.batch_size)
    right, sizes = Objective.loss, {}

    def loss(self, codes_BL, labels_B, branches=None):
        runs.clear()
        found = right(self, codes_BL, labels_B, branches)
        sizes[len(codes_BL)] = len(runs)
        if len(codes_BL) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return found

    monkeypatch.setattr(Objective, "loss", loss)
    trainer = make_trainer(codes, tokenizer_folder, CONFIG)
    trainer.prepare(0)
    assert sizes == dict.fromkeys([8, 4, 2, 1], CONFIG.depth + 3)


def test_every_model_of_a_process_is_compiled(codes, tokenizer_folder, runs):
    found = []
    for size in range(1, 5):
        trainer = make_trainer(codes, tokenizer_folder, replace(CONFIG, batch_size=size))
        runs.clear()
        trainer.objective.loss(*trainer.source.batch(0))
        found.append(len(runs))
    assert found == 4 * [CONFIG.depth + 3]
