"""A comparison is one picture of all runs over the axis that is asked for, smoothed without moving anything."""

from __future__ import annotations

import pytest
from PIL import Image
from run_folders import write_run

from varcli.data.runs import read_run
from varcli.errors import ArtifactError, ConfigError
from varcli.report import compare
from varcli.report.compare import AXES, MAX_RUNS, draw_comparison, short_names, smooth
from varcli.report.plots import COLOURS, Chart, Curve, draw_charts, is_wide, pale, short_number


def drawn(monkeypatch, runs, tmp_path, over="steps") -> list[Chart]:
    """The charts that a comparison hands to the pen."""
    charts: list[Chart] = []

    def keep(given, *arguments, **options):
        charts.extend(given)
        return Image.new("RGB", (4, 4))

    monkeypatch.setattr(compare, "draw_charts", keep)
    draw_comparison(runs, tmp_path / "out.png", over)
    return charts


@pytest.fixture
def runs(tmp_path):
    return [
        read_run(write_run(tmp_path / "runs" / "a", loss=4.0)),
        read_run(write_run(tmp_path / "runs" / "b", loss=3.0, batch_size=16)),
    ]


@pytest.mark.parametrize("over", AXES)
def test_a_png_is_drawn_over_each_axis(runs, tmp_path, over):
    path = draw_comparison(runs, tmp_path / f"{over}.png", over)
    image = Image.open(path)
    assert image.format == "PNG" and image.size == (1180, 2 * 420)  # losses, and the accuracy below
    seen = [colour for _, colour in image.convert("RGB").getcolors(1 << 20)]
    for colour in COLOURS[:2]:
        assert min(max(abs(a - b) for a, b in zip(colour, other)) for other in seen) < 8  # shrinking mixes colours


def test_each_run_ends_where_its_axis_says(runs, tmp_path, monkeypatch):
    ends = {}
    for over in AXES:
        chart = drawn(monkeypatch, runs, tmp_path, over)[0]
        ends[over] = [curve.line[-1][0] for curve in chart.curves]
        assert chart.curves[0].dots[-1][0] == pytest.approx(ends[over][0])
    assert ends["steps"] == [100, 100]
    assert ends["images"] == [800, 1600]
    assert ends["hours"] == pytest.approx([10 / 3600] * 2)


def test_looks_differ_and_names_are_short(tmp_path, monkeypatch):
    many = [read_run(write_run(tmp_path / "runs" / str(number))) for number in range(MAX_RUNS)]
    curves = drawn(monkeypatch, many, tmp_path)[0].curves
    assert len({(curve.colour, curve.dash) for curve in curves}) == MAX_RUNS
    assert [curve.name for curve in curves] == [str(number) for number in range(MAX_RUNS)]
    with pytest.raises(ConfigError, match="told apart"):
        draw_comparison([*many, many[0]], tmp_path / "out.png")


def test_a_spike_and_the_start_do_not_decide_what_is_seen(tmp_path, monkeypatch):
    records = [{"kind": "train", "step": step, "loss": 900.0 if step == 1 else 4.0} for step in range(1, 101)]
    (chart, *_) = drawn(monkeypatch, [read_run(write_run(tmp_path / "a", records=records))], tmp_path)
    assert chart.y_range == pytest.approx((4.0, 4.0))
    assert not chart.is_log
    draw_charts([chart])


def test_what_reaches_far_has_a_logarithmic_axis(tmp_path, monkeypatch):
    records = [{"kind": "train", "step": step, "loss": 100 / step} for step in range(1, 101)]
    (chart, *_) = drawn(monkeypatch, [read_run(write_run(tmp_path / "a", records=records))], tmp_path)
    assert chart.is_log
    assert is_wide([1, 9]) and not is_wide([1, 2]) and not is_wide([-1, 0])


def test_smoothing_keeps_straight_lines_and_both_ends_of_the_axis():
    line = [(float(x), 2.0 * x + 1) for x in range(50)]
    smoothed = smooth(line, 5.0)
    assert [x for x, _ in smoothed] == [x for x, _ in line]
    assert smoothed[0] == line[0]
    assert smoothed[10][1] == pytest.approx(line[10][1])
    noisy = [(float(x), 5.0 + (-1) ** x) for x in range(50)]
    assert max(abs(value - 5) for _, value in smooth(noisy, 8.0)[10:]) < 0.3
    assert smooth([], 1.0) == [] and smooth(noisy, 0.0) == noisy


def test_runs_without_a_loss_are_left_out_or_refused(runs, tmp_path):
    empty = read_run(write_run(tmp_path / "runs" / "c", records=[]))
    draw_comparison([*runs, empty], tmp_path / "out.png")
    with pytest.raises(ArtifactError, match="loss"):
        draw_comparison([empty], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
    with pytest.raises(ConfigError, match="unknown axis"):
        draw_comparison(runs, tmp_path / "out.png", "epochs")


def test_names_lose_the_folders_they_share(runs, tmp_path):
    assert short_names(runs) == ["a", "b"]
    assert short_names(runs[:1]) == ["a"]
    other = read_run(write_run(tmp_path / "tokenizers" / "a"))
    assert short_names([runs[0], other]) == ["runs/a", "tokenizers/a"]


def test_nothing_is_drawn_beside_its_chart():
    curve = Curve(name="a name " * 20, note="a note", colour=COLOURS[0], line=[(0, 1), (1, 50)], dots=[(0, 1), (1, 50)])
    chart = Chart(title="t", curves=[curve], x_name="x", y_range=(1, 2))  # the line leaves through the top
    image = draw_charts([chart, chart, chart], size=(400, 200), columns=2)
    assert image.size == (800, 400)
    assert image.crop((400, 200, 800, 400)).getcolors() == [(400 * 200, (255, 255, 255))]  # the empty fourth place
    above = image.crop((70, 20, 195, 40)).getcolors()
    assert above == [(125 * 20, (255, 255, 255))]


@pytest.mark.parametrize(
    "value, text", [(0.25, "0.25"), (1500, "1,500"), (20_000, "20k"), (1_280_000, "1.28M"), (3e9, "3G"), (0, "0")]
)
def test_numbers_of_axes_are_short(value, text):
    assert short_number(value) == text


def test_pale_is_between_a_colour_and_white():
    assert pale((0, 100, 200), 0.5) == (128, 178, 228)
    assert pale((0, 100, 200), 1.0) == (255, 255, 255)
