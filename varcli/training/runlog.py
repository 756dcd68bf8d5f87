"""The log of a run: metrics.jsonl, one JSON object a line, and TensorBoard's files if it is installed.

Train lines hold means over the steps since the line before; every line holds "step", the optimizer steps done by then,
and "kind": "train", "validation" or "event". Resuming cuts the lines after the checkpoint it goes on from.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from varcli.artifacts.verify import read_json_lines
from varcli.artifacts.write import append_json_line, write_text
from varcli.data.runs import LOG_NAME, read_log
from varcli.errors import ArtifactError
from varcli.training.board import open_board

__all__ = ["LOG_NAME", "RunLog", "read_log"]


class RunLog:
    """Append-only metrics of one run.

    resume_step: optimizer steps done by the checkpoint that the run goes on from. warn: told, once, if the log cannot
    be written: a full disk must not stop training before a checkpoint does. again: kinds of lines that will be written
    anew for that very step, so that those a killed process left are cut as well.
    """

    def __init__(
        self,
        run: Path,
        resume_step: int,
        use_tensorboard: bool,
        warn: Callable[[str], None],
        again: Collection[str] = (),
    ) -> None:
        self.path = run / LOG_NAME
        self.warn = warn
        self.is_broken = False
        kept = [
            record
            for record in read_json_lines(self.path)
            if record.get("step", 0) < resume_step + (record.get("kind") not in again)
        ]
        write_text(self.path, "".join(json.dumps(record) + "\n" for record in kept))
        self.warned = {record["about"] for record in kept if record.get("event") == "warning" and "about" in record}
        self.board = open_board(run, resume_step, warn) if use_tensorboard else None

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Append one line. Numbers, and lists of numbers, also go to TensorBoard, but for events."""
        record = {"kind": kind, "step": step, **{name: _finite(value) for name, value in values.items()}}
        try:
            append_json_line(self.path, record)
        except ArtifactError as error:
            if not self.is_broken:
                self.warn(f"the log is no longer written: {error}")
            self.is_broken = True
        if self.board is not None and kind != "event":
            self.board.write(kind, step, values)

    def write_warning(self, step: int, about: str, text: str) -> bool:
        """Append a warning as an event, unless one about the same was there, from an earlier session too. Says if it did."""
        if about in self.warned:
            return False
        self.warned.add(about)
        self.write("event", step, {"event": "warning", "about": about, "message": text})
        return True

    def write_image(self, step: int, image: Any) -> None:
        """Show a picture, PIL or (H, W, 3) uint8, in TensorBoard."""
        if self.board is not None:
            self.board.write_image(step, image)

    def close(self) -> None:
        """Flush what TensorBoard still holds."""
        if self.board is not None:
            self.board.close()


def _finite(value: Any) -> Any:
    """NaN and infinity are no JSON: they become text."""
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
