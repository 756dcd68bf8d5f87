"""Line charts as PNG pictures: curves, points, a legend beside them, axes that fit."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageDraw, ImageFont

Points = Sequence[tuple[float, float]]
Colour = tuple[int, int, int]

COLOURS: tuple[Colour, ...] = (
    (0, 114, 178),
    (213, 94, 0),
    (0, 158, 115),
    (204, 121, 167),
    (230, 159, 0),
    (86, 180, 233),
    (60, 60, 60),
)
"""Told apart with every kind of colour blindness. Source: Okabe and Ito, "Color Universal Design", without its yellow."""

MARKERS = ("circle", "square", "triangle", "diamond")
DASHES: tuple[tuple[int, ...], ...] = ((), (9, 4), (2, 3))  # pixels drawn and left out; () is a whole line

_FINER = 2  # drawn so many times larger, then shrunk, which smooths lines
_LEFT, _TOP, _BOTTOM = 62, 46, 44  # pixels around the curves
_INK, _QUIET, _FAINT, _MARK = "#222222", "#666666", "#dcdcdc", "#888888"
_PALE = 0.62  # share of white in what is drawn behind
_TITLE, _TEXT = 15, 12  # sizes of letters
_LINE = 15.0  # height of one in the legend
_SAMPLE = 22  # length of the piece of line beside a name
_EDGE = 5  # around the plot, so that points at its ends are whole
_LOG_FROM = 8.0  # largest over smallest value from which on a logarithm shows more


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One entry of the legend: a line, points, or both. All are (x, y) with x rising."""

    name: str
    colour: Colour
    line: Points = ()
    raw: Points = ()  # drawn thin and pale behind
    dots: Points = ()  # drawn as markers
    marker: str = "circle"  # one of MARKERS
    dash: tuple[int, ...] = ()  # one of DASHES
    note: str = ""  # in the legend, quieter


@dataclass(frozen=True, kw_only=True)
class Chart:
    """Curves over one pair of axes."""

    title: str
    curves: Sequence[Curve]  # with at least one point
    x_name: str
    x_range: tuple[float, float] | None = None  # None is that of the curves
    y_range: tuple[float, float] | None = None  # None is that of lines and dots; what lies outside is cut off
    is_log: bool = False  # values are spread by their logarithm; those not above 0 are left out
    remark: str = ""  # beside the title, quieter
    marks: Sequence[tuple[float, str]] = ()  # vertical lines, named


def draw_charts(
    charts: Sequence[Chart], size: tuple[int, int] = (600, 320), columns: int = 2, legend: int = 200
) -> Image.Image:
    """Draw charts row by row on white. size: of one in pixels; legend: the width of it that names the curves."""
    columns = min(columns, len(charts))
    whole = (columns * size[0], -(-len(charts) // columns) * size[1])
    image = Image.new("RGB", (whole[0] * _FINER, whole[1] * _FINER), "white")
    for number, chart in enumerate(charts):
        row, column = divmod(number, columns)
        _Drawing(image, (column * size[0], row * size[1]), size, legend, chart).draw()
    return image.resize(whole, Image.Resampling.LANCZOS)


def is_wide(values: Sequence[float]) -> bool:
    """Say whether values reach so far that their logarithm shows more of them; those not above 0 are not asked."""
    kept = [value for value in values if value > 0]
    return bool(kept) and max(kept) > _LOG_FROM * min(kept)


def pale(colour: Colour, share: float = _PALE) -> Colour:
    """Mix a colour with a share of white."""
    red, green, blue = (round(part + (255 - part) * share) for part in colour)
    return red, green, blue


def ticks_of(low: float, high: float, count: int = 5) -> list[float]:
    """Return about `count` round numbers that reach from `low` or below to `high` or above."""
    reach = (high - low) or abs(high) or 1.0
    power = 10 ** math.floor(math.log10(reach / count))
    width = next(power * factor for factor in (1, 2, 5, 10) if power * factor * count >= reach * 0.999)
    first, last = math.floor(low / width + 1e-9), math.ceil(high / width - 1e-9)
    return [round(number * width, 12) for number in range(first, max(last, first + 1) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Return numbers such as 0.1, 0.2, 0.5, 1 that reach from `low` or below to `high` or above, at most ten; low > 0."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 2, 5), (1, 3), (1,)):
        ticks = [float(f"{factor}e{power}") for power in powers for factor in factors]
        below = max(tick for tick in ticks if tick <= low * 1.000001)
        above = min((tick for tick in ticks if tick >= high * 0.999999), default=ticks[-1])
        ticks = [tick for tick in ticks if below <= tick <= above]
        if len(ticks) <= 10:
            break
    return ticks[:: -(-len(ticks) // 10)]


def short_number(value: float) -> str:
    """Write a number of an axis: 0.25, 1,500, 20k, 1.28M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= (1e4 if letter == "k" else size):
            return f"{value / size:.4g}{letter}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:g}"


class _Drawing:
    """One chart being drawn with its upper left corner at `corner`, in pixels of the finished picture."""

    def __init__(
        self, image: Image.Image, corner: tuple[int, int], size: tuple[int, int], legend: int, chart: Chart
    ) -> None:
        self.image, self.corner, self.chart = image, corner, chart
        self.pen = ImageDraw.Draw(image)
        self.bold, self.small = (ImageFont.load_default(height * _FINER) for height in (_TITLE, _TEXT))
        self.left, self.top = corner[0] + _LEFT, corner[1] + _TOP
        self.right, self.bottom = corner[0] + size[0] - legend, corner[1] + size[1] - _BOTTOM
        self.legend = legend
        xs = [x for curve in chart.curves for x, _ in (*curve.line, *curve.raw, *curve.dots)]
        values = [value for curve in chart.curves for _, value in self._kept((*curve.line, *curve.dots))]
        low, high = chart.y_range or (min(values), max(values))
        self.x_range = chart.x_range or (min(xs), max(xs))
        self.ticks = log_ticks(low, high) if chart.is_log else ticks_of(low, high)
        self.scale: Callable[[float], float] = math.log10 if chart.is_log else float
        self.y_range = self.scale(min(self.ticks[0], low)), self.scale(max(self.ticks[-1], high))

    def draw(self) -> None:
        """Draw all of it: axes first, then raw lines, lines and points, so that none hides what matters more."""
        self._axes()
        corner = (self.left - _EDGE) * _FINER, (self.top - _EDGE) * _FINER
        size = (self.right - self.left + 2 * _EDGE) * _FINER, (self.bottom - self.top + 2 * _EDGE) * _FINER
        layer = self.image.crop((*corner, corner[0] + size[0], corner[1] + size[1]))
        pen = ImageDraw.Draw(layer)  # of the plot alone, which cuts off what lies outside

        def place(points: Points) -> list[tuple[float, float]]:
            return [(x - corner[0], y - corner[1]) for x, y in (self._at(*point) for point in self._kept(points))]

        for curve in self.chart.curves:
            if len(places := place(curve.raw)) > 1:
                pen.line(places, fill=pale(curve.colour), width=_FINER, joint="curve")
        for curve in self.chart.curves:
            if len(places := place(curve.line)) > 1:
                _line(pen, places, curve.colour, curve.dash)
        for curve in self.chart.curves:
            for x, y in place(curve.dots or (curve.line if len(curve.line) == 1 else ())):
                _marker(pen, x, y, curve.marker, curve.colour)
        self.image.paste(layer, corner)
        self._legend()

    def _axes(self) -> None:
        chart, pen = self.chart, self.pen
        self._write(self.left, self.corner[1] + 10, chart.title, "lt", self.bold)
        if chart.remark:
            width = self.bold.getlength(chart.title) / _FINER
            self._write(self.left + width + 12, self.corner[1] + 13, chart.remark, "lt", fill=_QUIET)
        for tick in self.ticks:
            y = self._at(self.x_range[0], tick)[1]
            pen.line([(self.left * _FINER, y), (self.right * _FINER, y)], fill=_FAINT, width=_FINER)
            self._write(self.left - 6, y / _FINER, f"{tick:g}", "rm")
        bottom = self._value_at(self.y_range[0])
        few = 5 if self.right - self.left < 500 else 8
        first, last = self.x_range
        for tick in ticks_of(first, last, few) if first < last else (first,):
            if self.x_range[0] <= tick <= self.x_range[1]:
                self._write(self._at(tick, bottom)[0] / _FINER, self.bottom + 7, short_number(tick), "mt")
        self._write(self.right, self.bottom + 24, chart.x_name, "rt", fill=_QUIET)
        for at, name in chart.marks:
            if self.x_range[0] <= at <= self.x_range[1]:
                x = self._at(at, bottom)[0]
                pen.line([(x, self.top * _FINER), (x, self.bottom * _FINER)], fill=_MARK, width=_FINER)
                self._write(x / _FINER - 3, self.top - 2, name, "rb", fill=_MARK)

    def _legend(self) -> None:
        curves = self.chart.curves
        room = self.legend - _SAMPLE - 24
        widths = [self.small.getlength(f"{curve.name}  {curve.note}") / _FINER for curve in curves]
        on_one_line = max(widths) <= room
        lines = sum(1 if on_one_line or not curve.note else 2 for curve in curves)
        height = min(_LINE, (self.bottom - self.top) / lines)
        gap = min(4.0, (self.bottom - self.top - lines * height) / len(curves)) if lines > len(curves) else 0.0
        start, y = self.right + 10, self.top + height / 2
        for curve in curves:
            if curve.line:
                ends = [(x * _FINER, y * _FINER) for x in (start, start + _SAMPLE)]
                _line(self.pen, ends, curve.colour, curve.dash)
            if curve.dots:
                _marker(self.pen, (start + _SAMPLE / 2) * _FINER, y * _FINER, curve.marker, curve.colour)
            x = start + _SAMPLE + 6
            name = self._fit(curve.name, room * _FINER)
            self._write(x, y, name, "lm")
            if curve.note and on_one_line:
                self._write(x + self.small.getlength(f"{name}  ") / _FINER, y, curve.note, "lm", fill=_QUIET)
            elif curve.note:
                y += height
                self._write(x, y, self._fit(curve.note, room * _FINER), "lm", fill=_QUIET)
            y += height + gap

    def _value_at(self, place: float) -> float:
        return 10**place if self.chart.is_log else place

    def _kept(self, points: Points) -> Points:
        return [(x, value) for x, value in points if value > 0] if self.chart.is_log else points

    def _at(self, x: float, value: float) -> tuple[float, float]:
        """Where a point lies, in pixels of the picture before it is shrunk."""
        reach = self.x_range[1] - self.x_range[0]
        across = (x - self.x_range[0]) / reach if reach else 0.5
        up = (self.scale(value) - self.y_range[0]) / ((self.y_range[1] - self.y_range[0]) or 1)
        across = self.left + across * (self.right - self.left)
        return across * _FINER, (self.bottom - up * (self.bottom - self.top)) * _FINER

    def _write(self, x: float, y: float, text: str, anchor: str, font: Any = None, fill: Any = _INK) -> None:
        self.pen.text((x * _FINER, y * _FINER), text, fill=fill, font=font or self.small, anchor=anchor)

    def _fit(self, text: str, width: float) -> str:
        """Leave out of the middle of a name what does not fit."""
        if self.small.getlength(text) <= width:
            return text
        for kept in range(len(text) - 1, 1, -1):
            shorter = f"{text[: kept // 3]}...{text[len(text) - (kept - kept // 3) :]}"
            if self.small.getlength(shorter) <= width:
                return shorter
        return text[:2]


def _line(pen: ImageDraw.ImageDraw, places: Points, colour: Colour, dash: tuple[int, ...]) -> None:
    width = 2 * _FINER
    if not dash:
        pen.line(places, fill=colour, width=width, joint="curve")
        return
    drawn, gap = dash[0] * _FINER, dash[1] * _FINER
    walked = 0.0  # along the whole line, so that the dashes go on around its corners
    for (x, y), (to_x, to_y) in zip(places, places[1:]):
        length = math.hypot(to_x - x, to_y - y)
        at = 0.0
        while at < length:
            phase = (walked + at) % (drawn + gap)
            step = min(length - at, drawn - phase if phase < drawn else drawn + gap - phase) + 1e-6
            if phase < drawn:
                ends = [
                    (x + (to_x - x) * share, y + (to_y - y) * share) for share in (at / length, (at + step) / length)
                ]
                pen.line(ends, fill=colour, width=width)
            at += step
        walked += length


def _marker(pen: ImageDraw.ImageDraw, x: float, y: float, marker: str, colour: Colour) -> None:
    radius = 3.2 * _FINER
    outline = "white"  # keeps a point apart from the line below it
    if marker == "circle":
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour, outline=outline)
    elif marker == "square":
        side = radius * 0.9
        pen.rectangle((x - side, y - side, x + side, y + side), fill=colour, outline=outline)
    else:
        reach = radius * 1.25
        corners = [(x, y - reach), (x + reach, y + reach * 0.8), (x - reach, y + reach * 0.8)]
        if marker == "diamond":
            corners = [(x, y - reach), (x + reach, y), (x, y + reach), (x - reach, y)]
        pen.polygon(corners, fill=colour, outline=outline)
