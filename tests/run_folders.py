"""Run folders as training leaves them, made without training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def write_run(
    folder: Path,
    steps: int = 100,
    done: int = 100,
    kind: str = "transformer",
    loss: float = 4.0,
    records: list[dict[str, Any]] | None = None,
    **config: Any,
) -> Path:
    """A run whose training loss falls from `loss` + 1 to `loss`, logged every 10 steps and validated every 50."""
    settings = {"depth": 4, "width": None, "steps": steps, "batch_size": 8, "learning_rate": 0.001, **config}
    if records is None:
        records = []
        for step in range(10, done + 1, 10):
            value = loss + 10 / step
            rate = {"images_per_second": 80.0, "seconds": step * 0.1, "gradient_norm": 0.5}
            records.append({"kind": "train", "step": step, "loss": value, "accuracy": 0.1, **rate})
            if step % 50 == 0:
                records.append(
                    {"kind": "validation", "step": step, "loss": value + 0.1, "accuracy": 0.09, "images": 12}
                )
    folder.mkdir(parents=True)
    stored = {
        "kind": kind,
        "config": settings,
        "inputs": {"codes": "abc"},
        "made_by": {"varcli": "0.1", "torch": "2.11"},
    }
    (folder / "config.json").write_text(json.dumps(stored))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder
