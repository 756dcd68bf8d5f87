"""A run as TensorBoard shows it: scalars, curves of each scale, pictures, settings. Nothing where it is not installed.

train/loss, validation/accuracy, evaluation/fid, ...     numbers of the log by the kind of their line
validation_loss_by_scale/scale_3                         numbers that each scale has one of, a group each
samples                                                  the pictures of samples/
config                                                   the settings as a table; also under HParams
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from varcli.artifacts.verify import read_json
from varcli.config import flatten
from varcli.data.runs import CONFIG_NAME
from varcli.errors import ArtifactError

TENSORBOARD_NAME = "tensorboard"

_SCALE = re.compile(r"(.+)_scale_(\d+)")
_RANKING = ("validation/loss", "train/loss")  # what HParams lists runs by
_BY_SCALE = ("loss", "accuracy", "codebook_used", "perplexity")


class Board:
    """TensorBoard's files of one run; get one from `open_board`.

    warn: told, once, if they cannot be written: a full disk must not stop training.
    """

    def __init__(self, writer: Any, warn: Callable[[str], None]) -> None:
        self.writer, self.warn = writer, warn

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Add the numbers, and lists of numbers, of a line of the log."""
        for name, value in values.items():
            stem = name.removesuffix("_by_scale")
            entries = {f"{kind}/{name}": value}
            if isinstance(value, (list, tuple)):
                entries = {_scale_tag(kind, stem, scale): entry for scale, entry in enumerate(value)}
            elif match := _SCALE.fullmatch(name):
                entries = {_scale_tag(kind, match[1], int(match[2])): value}
            for tag, entry in entries.items():
                if isinstance(entry, (int, float)):
                    self._try("add_scalar", tag, entry, step)

    def write_image(self, step: int, image: Any) -> None:
        """Add a picture, PIL or (H, W, 3) uint8."""
        import numpy as np

        self._try("add_image", "samples", np.asarray(image), step, dataformats="HWC")

    def write_config(self, stored: Mapping[str, Any], step: int) -> None:
        """Add what the run was begun with, as config.json has it: a table, and hyperparameters to rank runs by."""
        settings = {"kind": stored.get("kind"), **flatten(stored.get("config", {}))}
        rows = "".join(f"| {name} | `{value}` |\n" for name, value in settings.items())
        self._try("add_text", "config", f"| setting | value |\n| --- | --- |\n{rows}", step)
        plain = {
            name: value if isinstance(value, (bool, int, float, str)) else str(value)
            for name, value in settings.items()
        }
        try:
            from torch.utils.tensorboard.summary import hparams

            # in this run's own files: the writer's add_hparams would begin another run for each call
            for summary in hparams(plain, dict.fromkeys(_RANKING, 0)):
                self.writer.file_writer.add_summary(summary)
        except OSError as error:
            self._give_up(error)
        layout = {name: ["Multiline", [_scale_tag("validation", name, None)]] for name in _BY_SCALE}
        self._try("add_custom_scalars", {"validation by scale": layout})

    def close(self) -> None:
        """Flush what is not written yet."""
        self._try("close")

    def _try(self, method: str, *arguments: Any, **options: Any) -> None:
        if self.writer is None:
            return
        try:
            getattr(self.writer, method)(*arguments, **options)
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        self.writer = None
        self.warn(f"TensorBoard's files are no longer written: {error}")


def open_board(run: Path, resume_step: int, warn: Callable[[str], None]) -> Board | None:
    """Open a run's TensorBoard files, hiding what an earlier session wrote after `resume_step`; None if not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None  # an optional extra: pip install varcli[tensorboard]
    try:
        writer = SummaryWriter(str(run / TENSORBOARD_NAME), purge_step=resume_step + 1 if resume_step else None)
    except OSError as error:
        warn(f"TensorBoard's files cannot be written: {error}")
        return None
    board = Board(writer, warn)
    with contextlib.suppress(ArtifactError):  # a loop of somebody's own may do without a config
        board.write_config(read_json(run / CONFIG_NAME), resume_step)
    return board


def _scale_tag(kind: str, name: str, scale: int | None) -> str:
    """Tag of a number of one scale, or the pattern of all of them."""
    return f"{kind}_{name}_by_scale/scale_{'.*' if scale is None else scale}"
