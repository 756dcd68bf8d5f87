"""The live view of training: what it shows at which width, what it makes of messages, and that it gives way to lines."""

from __future__ import annotations

import dataclasses
import io

import pytest
import torch
from rich.console import Console

from varcli.cli import console, live
from varcli.cli.live import TrainingView, Work, expect, training_progress
from varcli.progress import Step

GIB = 2**30
TRAIN = {
    "loss": 4.2134,
    "accuracy": 0.0421,
    "learning_rate": 8.1e-5,
    "gradient_norm": 0.423,
    "images_per_second": 431.0,
}
VALIDATION = {
    "loss": 4.31,
    "accuracy": 0.041,
    "loss_by_scale": [2.1, 3.1, 4.2, 4.5, 4.6, 4.7, 4.8, 4.9, 5.01, 5.1],
    "accuracy_by_scale": [0.31, 0.2, 0.15, 0.1, 0.08, 0.06, 0.05, 0.045, 0.04, 0.035],
}
DETAILS = {"train": TRAIN, "validation": VALIDATION, "best": {"step": 11_000, "loss": 4.301}, "seconds": 3720.0}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, to be set by hand."""
    now = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def view(clock) -> TrainingView:
    """A view of a run at step 12,340 of 50,000, which began this session at step 2,340, 1,000 s ago."""
    shown = TrainingView("training")
    memory = (41 * GIB, 55 * GIB, 80 * GIB)
    shown.work = Work(tokens=680, tflop=1.27, peak_tflops=780.0, read_memory=lambda: memory)
    shown._take(Step(2340, 50_000))
    clock[0] = 1000.0
    shown._take(Step(12_340, 50_000, details=DETAILS))
    return shown


def render(shown: TrainingView, width: int = 80, height: int = 30, encoding: str = "utf-8", colour: str | None = None):
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding, newline="\n")
    screen = Console(
        file=file, width=width, height=height, force_terminal=True, color_system=colour, legacy_windows=False
    )
    screen.print(shown)
    file.flush()
    return file.buffer.getvalue().decode(encoding)


def test_at_80_columns_everything_is_there(view):
    text = render(view)
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80 and len(lines) == 8
    for word in (
        "12,340/50,000",
        "24.7%",
        "4.213",
        "smoothed 4.213",
        "accuracy 4.21%",
        "lr 8.1e-05",
        "gradient 0.423",
        "431 img/s",
        "293k tokens/s",
        "547 TFLOP/s = 70% of the matmul rate",
        "1h02m left",
        "1h02m trained",
        "41.00 GiB now",
        "55.00 GiB at most",
        "of 80.0 GiB",
        "at 12,340",
        "loss 4.31 (best 4.301 at 11,000)",
        "accuracy 4.10%",
        "▄2.10 ",
        "█5.10",
        "█31%",
    ):
        assert word in text, word


@pytest.mark.parametrize("width", [200, 100, 79, 60, 40, 30, 25, 12, 5, 1])
@pytest.mark.parametrize("height", [30, 6, 1])
def test_no_line_is_wider_than_the_terminal(view, width, height):
    lines = render(view, width, height).splitlines()
    assert max(map(len, lines)) <= width
    assert len(lines) <= max(height, 2)
    if width >= 25:
        assert "12,340/50,000" in lines[0]


def test_what_fits_is_what_matters_most(view):
    text = render(view, 60)
    assert "4.213" in text and "431 img/s" in text and "1h02m left" in text
    assert "gradient" not in text and "TFLOP" not in text
    assert "2.10 to 5.10" in text and "31% to 4%" in text


def test_terminals_without_blocks_get_numbers(view):
    text = render(view, encoding="ascii")
    assert "2.10 3.10" in text and text.isascii()


def test_colour_is_a_matter_of_the_terminal(view, monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b[9" in render(view, colour="standard")
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[9" not in render(view, colour="standard")


def test_before_the_first_log_line_there_is_a_word(clock):
    shown = TrainingView("training")
    shown._take(Step(0, 100))
    clock[0] = 10.0
    shown._take(Step(5, 100))
    text = render(shown)
    assert "the first log line is to come" in text and "0.5 steps/s" in text and "3m10s left" in text
    assert "validated" not in text and "memory" not in text


def test_time_left_goes_on_during_a_long_step(view, clock):
    clock[0] += 180.0
    assert "59m46s left" in render(view)
    clock[0] += 1e6
    assert " left" not in render(view)


def test_odd_numbers_are_shown_and_not_kept(view):
    odd = {"loss": float("nan"), "loss_by_scale": [float("nan"), 2.0], "images": 3}
    view._take(Step(12_350, 50_000, details={"train": {"loss": float("nan")}, "validation": odd, "best": None}))
    text = render(view)
    assert "nan  smoothed 4.213" in text and "▁nan" in text
    view._take(Step(12_360, 50_000, details={"train": {**TRAIN, "loss": 2.2134}, "validation": odd, "best": None}))
    assert "smoothed 4.013" in render(view)


def test_a_tokenizers_run_shows_its_own_numbers(clock):
    shown = TrainingView("training")
    health = {f"codebook_used_scale_{k}": 0.1 * (k + 1) for k in range(3)} | {
        f"perplexity_scale_{k}": 9.0 for k in range(3)
    }
    validation = {"loss": 0.1, "psnr": 23.456, "codebook_used": 0.98, **health}
    best = {"step": 50, "loss": 0.1}
    shown._take(Step(50, 100, details={"train": {"loss": 0.2}, "validation": validation, "best": best}))
    text = render(shown)
    for word in ("at 50", "loss 0.1 (best)", "PSNR 23.46", "used 98.00%", "  used", "10%", "30%", "perplexity"):
        assert word in text


@pytest.fixture
def terminal(capsys, monkeypatch):
    monkeypatch.setattr(console, "is_terminal", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("NO_COLOR", raising=False)
    return capsys


def test_messages_stand_above_and_the_view_stays_until_something_else_is_printed(terminal):
    on_step = training_progress("training")
    on_step(Step(0, 10, message="a tokenizer for 64 px"))
    assert console.Display.running is None  # nothing to draw yet
    on_step(Step(1, 10, details=DETAILS))
    on_step(Step(10, 10, details=DETAILS, message="validation [b] after \x1b"))
    assert console.Display.running is on_step
    console.result("done")
    assert console.Display.running is None
    seen = terminal.readouterr()
    assert seen.err.startswith("a tokenizer for 64 px\n")
    assert "validation [b] after \\x1b" in seen.err
    assert "10/10" in seen.err and seen.err.rstrip().endswith("\x1b[?25h")  # the cursor is given back
    assert seen.out == "done\n"


def test_what_is_read_first_has_a_bar_of_its_own(terminal):
    on_step = training_progress("training")
    on_step(Step(1, 2, "images"))
    on_step(Step(2, 2, "images"))
    assert console.Display.running is None
    on_step(Step(1, 10, details=DETAILS))
    assert console.Display.running is on_step
    console.close_progress()
    seen = terminal.readouterr().err
    assert "2/2 images" in seen and "reading" in seen


def test_without_a_terminal_there_are_lines(capsys, clock):
    on_step = training_progress("training")
    clock[0] = 6.0
    on_step(Step(5, 10, values={"loss": 4.0}, details=DETAILS))
    assert capsys.readouterr().err == "training: 5/10 steps, loss 4\n"
    expect(on_step, None, torch.device("cpu"))  # nothing to tell
    on_step(Step(20, 20, "images"))
    assert capsys.readouterr().err == "reading: 20/20 images\n"


@dataclasses.dataclass
class Plan:
    """What the view asks of a plan."""

    depth: int = 16
    width: int = 1024
    tokens_per_image: int = 680
    vocab_size: int = 4096
    precision: str = "bf16"


def test_a_plan_gives_work_and_no_peak_on_a_cpu(monkeypatch):
    shown = TrainingView("training")
    expect(shown, Plan(), torch.device("cpu"))
    assert shown.work.tokens == 680 and shown.work.peak_tflops is None
    assert shown.work.tflop == pytest.approx(0.929, rel=0.01)
    now, most, whole = shown.work.read_memory()
    assert (now, whole) == (None, None) and most > 0
    monkeypatch.setattr(live, "_measure_peak", lambda device, precision: 700.0)
    expect(shown, Plan(), torch.device("cpu"), num_devices=4)
    assert shown.work.peak_tflops == 2800.0


@pytest.mark.gpu
def test_the_peak_of_a_gpu_is_measured_and_leaves_no_memory_taken():
    shown = TrainingView("training")
    square = torch.ones(64, 64, dtype=torch.bfloat16, device="cuda")
    (square @ square).sum().item()  # the first product reserves cuBLAS's workspace, which stays
    before = torch.cuda.memory_reserved()
    expect(shown, Plan(), torch.device("cuda"))
    assert shown.work.peak_tflops > 10
    assert torch.cuda.memory_reserved() <= before
    now, most, whole = shown.work.read_memory()
    assert 0 <= now <= most < whole
