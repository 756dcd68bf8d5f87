"""The live view of a training run on a terminal: a few lines that say how far, how fast and how good it is."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from varcli.cli import console
from varcli.progress import OnStep, Step, format_seconds

if TYPE_CHECKING:
    import torch
    from rich.console import Console, ConsoleOptions, RenderableType

    from varcli.training.plan import TrainPlan

_KEEP = 0.9  # share of the smoothed loss that one log line leaves
_READING = "reading"  # what has to be done before the first step
_LABEL = 13  # width of the names on the left
_GAP = "  "  # between entries
_BLOCKS = "▁▂▃▄▅▆▇█"
_SCALE = re.compile(r"(.+)_scale_(\d+)")
_QUALITY = ("psnr", "perceptual", "accuracy", "codebook_used", "perplexity")  # of a validation, beside its loss
_SHARES = {"accuracy", "codebook_used"}  # shown in percent
_BY_SCALE = ("loss", "accuracy", "codebook_used", "perplexity")  # bar rows, of which a run has two
_NAMES = {"codebook_used": "used", "psnr": "PSNR"}


def training_progress(description: str) -> OnStep:
    """Return an `on_step` callback for a training run: a live view on a terminal, lines now and then elsewhere."""
    if console.is_terminal():
        return TrainingView(description)
    reading, training = console.progress(_READING), console.progress(description)
    return lambda step: (training if step.unit == "steps" else reading)(step)


def expect(view: OnStep, plan: TrainPlan | None, device: torch.device, num_devices: int = 1) -> None:
    """Tell a live view what is about to be trained on what, so that it can show more. Elsewhere nothing is done.

    plan: gives tokens and TFLOP/s, and on CUDA their share of the matrix product's rate, which takes a second or less to
    measure. device: of this process, whose memory is shown. num_devices: how many share a batch.
    """
    if not isinstance(view, TrainingView):
        return
    view.work = Work(read_memory=_memory_reader(device))
    if plan is None:
        return
    from varcli.scaling.flops import training_flops

    flops = training_flops(plan.depth, plan.width, (plan.tokens_per_image,), plan.vocab_size)
    peak = _measure_peak(device, plan.precision)
    view.work = replace(
        view.work,
        tokens=plan.tokens_per_image,
        tflop=flops / 1e12,
        peak_tflops=None if peak is None else peak * num_devices,
    )


@dataclass(frozen=True, kw_only=True)
class Work:
    """What the trainer works on. None is what is not known."""

    tokens: int | None = None  # of an image
    tflop: float | None = None  # 1e12 operations, forward and backward, of an image
    peak_tflops: float | None = None  # of the devices' matrix product, 1e12 a second
    read_memory: Callable[[], tuple[int | None, int, int | None]] | None = None  # bytes: now, at most, of how many


class TrainingView(console.Display):
    """The view itself; an `on_step` callback of `run_training`, and what rich draws.

    Messages are printed above it, where the terminal keeps them. It stays until something else is printed.
    """

    def __init__(self, description: str) -> None:
        super().__init__()
        self.description = description
        self.work = Work()
        self.clock = console.Clock()
        self.step = Step(0, None)
        self.smoothed: float | None = None
        self.memory: tuple[int | None, int, int | None] | None = None
        self.validation_step: int | None = None
        self._train: Any = None
        self._validation: Any = None
        self._bar: console.Bar | None = None

    def __call__(self, step: Step) -> None:
        if step.unit != "steps":  # something that has to be read first
            self._bar = self._bar or console.Bar(_READING)
            self._bar(step)
            return
        if step.message and not step.details:  # before the first step
            console.note(step.message)
            return
        self._take(step)
        if self.display is None:
            self._start()
        if step.message:
            self.say(step.message)

    def _take(self, step: Step) -> None:
        train, validation = step.details.get("train"), step.details.get("validation")
        if train is not self._train and train:
            loss = train.get("loss")
            if loss is not None and loss == loss:  # not NaN, which would stay
                self.smoothed = loss if self.smoothed is None else _KEEP * self.smoothed + (1 - _KEEP) * loss
        if validation is not self._validation and validation:
            self.validation_step = step.done
        self._train, self._validation = train, validation
        self.clock.update(step)
        self.step = step
        if self.work.read_memory is not None:
            self.memory = self.work.read_memory()

    def _start(self) -> None:
        from rich.console import Console
        from rich.live import Live

        # drawn by a thread of rich twice a second, so that times go on during a long step
        self.show(Live(self, console=Console(stderr=True), refresh_per_second=2))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        from rich.text import Text

        width = options.max_width
        has_blocks = not options.ascii_only
        yield from self._head(width)
        lines = [row for row in self._rows(width, has_blocks) if row is not None]
        for label, text in lines[: max(1, console.size.height - 3)]:
            line = Text(no_wrap=True, overflow="crop")
            if width >= 3 * _LABEL:
                line.append(f"{label:<{_LABEL}}", style="dim")
            line.append(text)
            yield line

    def _head(self, width: int) -> Iterator[RenderableType]:
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        step = self.step
        total = step.total or 0
        done = f"{step.done:,}/{total:,}" + (f"  {step.done / total:.1%}" if total and width >= 40 else "")
        bar_width = width - len(done) - 2
        if bar_width < 8:
            yield Text(done, no_wrap=True, overflow="crop")
            return
        grid = Table.grid(padding=(0, 2, 0, 0))
        name = self.description if len(self.description) <= width - len(done) - 22 else ""
        if name:
            bar_width -= len(name) + 2
        bar = ProgressBar(total=max(total, 1), completed=step.done, width=bar_width)
        grid.add_row(*([Text(console.printable(name), style="bold")] if name else []), bar, Text(done))
        yield grid

    def _rows(self, width: int, has_blocks: bool) -> Iterator[tuple[str, str] | None]:
        """Label and text of each line, the most important first; what does not fit a line is left out of it."""
        room = width - _LABEL if width >= 3 * _LABEL else width
        for label, entries in (("loss", self._loss()), ("rate", self._rate()), ("time", self._time())):
            yield _row(label, entries, room)
        yield _row("memory", self._memory(), room)
        yield _row("validated", self._validated(), room)
        for name, values in self._by_scale():
            yield f"  {_NAMES.get(name, name)}", _bars(values, name in _SHARES, room, has_blocks)

    def _loss(self) -> Sequence[str]:
        train = self.step.details.get("train") or {}
        entries = []
        if "loss" in train:
            entries.append(f"{train['loss']:.4g}")
        if self.smoothed is not None:
            entries.append(f"smoothed {self.smoothed:.4g}")
        if "accuracy" in train:
            entries.append(f"accuracy {train['accuracy']:.2%}")
        for name, short in (("learning_rate", "lr"), ("gradient_norm", "gradient")):
            if name in train:
                entries.append(f"{short} {train[name]:.3g}")
        return entries or ["the first log line is to come"]

    def _rate(self) -> Sequence[str]:
        rate, work = (self.step.details.get("train") or {}).get("images_per_second"), self.work
        if rate is None:
            return [] if self.clock.rate is None else [f"{self.clock.rate:.3g} steps/s"]
        entries = [f"{_count(rate)} img/s"]
        if work.tokens is not None:
            entries.append(f"{_count(rate * work.tokens)} tokens/s")
        if work.tflop is not None:
            share = f" = {rate * work.tflop / work.peak_tflops:.0%} of the matmul rate" if work.peak_tflops else ""
            entries.append(f"{rate * work.tflop:.3g} TFLOP/s{share}")
        return entries

    def _time(self) -> Sequence[str]:
        entries = []
        left = self.clock.seconds_left(self.step)
        if left is not None:
            # the last report may be a long step ago
            left = max(0.0, left - (time.monotonic() - self.clock.seen))
        if left:
            entries += [f"{format_seconds(left)} left", f"done {_moment(left)}"]
        if seconds := self.step.details.get("seconds"):
            entries.append(f"{format_seconds(seconds)} trained")
        return entries

    def _memory(self) -> Sequence[str]:
        if self.memory is None:
            return []
        now, most, whole = self.memory
        entries = [] if now is None else [f"{now / 2**30:.2f} GiB now"]
        entries.append(f"{most / 2**30:.2f} GiB at most")
        return entries if whole is None else [*entries, f"of {whole / 2**30:.1f} GiB"]

    def _validated(self) -> Sequence[str]:
        values, best = self.step.details.get("validation") or {}, self.step.details.get("best")
        if not values:
            return []
        entries = [] if self.validation_step is None else [f"at {self.validation_step:,}"]
        if "loss" in values:
            is_best = bool(best) and best["step"] == self.validation_step
            note = " (best)" if is_best else f" (best {best['loss']:.4g} at {best['step']:,.0f})" if best else ""
            entries.append(f"loss {values['loss']:.4g}{note}")
        for name in _QUALITY:
            if name in values:
                shown = f"{values[name]:.2%}" if name in _SHARES else f"{values[name]:.4g}"
                entries.append(f"{_NAMES.get(name, name)} {shown}")
        return entries

    def _by_scale(self) -> Iterator[tuple[str, list[float]]]:
        """Numbers that each scale has one of, coarse to fine."""
        values: Mapping[str, Any] = self.step.details.get("validation") or {}
        found: dict[str, dict[int, float]] = {}
        for key, value in values.items():
            if isinstance(value, list):
                found[key.removesuffix("_by_scale")] = dict(enumerate(value))
            elif match := _SCALE.fullmatch(key):
                found.setdefault(match[1], {})[int(match[2])] = value
        for name in _BY_SCALE:
            if found.get(name):
                yield name, [found[name][scale] for scale in sorted(found[name])]


def _row(label: str, entries: Sequence[str], room: int) -> tuple[str, str] | None:
    """Join as many entries as fit; None if there are none."""
    kept: list[str] = []
    for entry in entries:
        if kept and len(_GAP.join([*kept, entry])) > room:
            break
        kept.append(entry)
    return (label, _GAP.join(kept)) if kept else None


def _bars(values: Sequence[float], is_share: bool, room: int, has_blocks: bool) -> str:
    """Draw a bar for each value, 0 to the largest, with numbers where they fit, else with those of both ends."""
    texts = [f"{100 * value:.0f}%" if is_share else f"{value:#.3g}".rstrip(".") for value in values]
    most = max((value for value in values if value == value), default=0.0)
    blocks = [_block(value, most) if has_blocks else "" for value in values]
    long = " ".join(f"{block}{text:<4}" for block, text in zip(blocks, texts, strict=True)).rstrip()
    if len(long) <= room:
        return long
    short = f"{''.join(blocks)} {texts[0]} to {texts[-1]}".strip()
    return short if len(short) <= room else "".join(blocks)[:room]


def _block(value: float, most: float) -> str:
    share = value / most if most > 0 and value == value else 0.0
    return _BLOCKS[min(len(_BLOCKS) - 1, max(0, round(share * (len(_BLOCKS) - 1))))]


def _count(value: float) -> str:
    for size, letter in ((1e6, "M"), (1e4, "k")):
        if value >= size:
            return f"{value / (1e6 if letter == 'M' else 1e3):.3g}{letter}"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _moment(seconds: float) -> str:
    """When so many seconds will have passed, as a clock on the wall says it."""
    then = time.localtime(time.time() + seconds)
    return time.strftime("%H:%M" if seconds < 43_200 else "%a %H:%M" if seconds < 518_400 else "%d %b", then)


def _measure_peak(device: torch.device, precision: str) -> float | None:
    """The device's matrix product in TFLOP/s; None but on CUDA, or if there is no memory to spare for it."""
    if device.type != "cuda":
        return None
    import torch

    from varcli.bench.calibrate import measure_matmul
    from varcli.devices import PRECISIONS
    from varcli.errors import is_out_of_memory

    try:
        return measure_matmul(device, PRECISIONS[precision])
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return None
    finally:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def _memory_reader(device: torch.device) -> Callable[[], tuple[int | None, int, int | None]]:
    import torch

    from varcli.training.plan import process_bytes

    if device.type != "cuda":
        return lambda: (None, process_bytes(), None)
    whole = torch.cuda.get_device_properties(device).total_memory
    return lambda: (torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device), whole)
