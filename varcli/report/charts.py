"""Charts as SVG, which pages show and browsers open."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_WIDTH, _HEIGHT, _MARGIN = 640, 380, 52  # in the chart's own units
_BARS_HEIGHT = 140
_RADIUS, _LETTER, _LINE = 4.5, 6.6, 13  # of a dot; width and height of a letter at the font's size
_MARK, _PLAIN = "#d2452d", "#3b77bc"  # both are read on white and on black


@dataclass(frozen=True, kw_only=True)
class Dot:
    """One point of a scatter chart."""

    x: float
    y: float
    name: str
    is_marked: bool = False  # drawn in the other colour


def scatter(dots: Sequence[Dot], x_name: str, y_name: str, *, log_x: bool = False) -> str:
    """Draw named dots; x grows to the right, y upwards. Returns an svg element that carries its own colours.

    log_x: spread positive x by their logarithm. Where names would lie on one another, earlier dots and the marked one keep
    theirs, and the others tell it when pointed at. Dots that are not finite are left out.
    """
    dots = sorted(
        (dot for dot in dots if math.isfinite(dot.x) and math.isfinite(dot.y)), key=lambda dot: -dot.is_marked
    )
    if not dots:
        return ""
    scale = math.log if log_x else float
    left, right = min(scale(dot.x) for dot in dots), max(scale(dot.x) for dot in dots)
    low, high = min(dot.y for dot in dots), max(dot.y for dot in dots)
    end = _WIDTH - 2.5 * _MARGIN

    def place(dot: Dot) -> tuple[float, float]:
        across, up = (scale(dot.x) - left) / ((right - left) or 1), (dot.y - low) / ((high - low) or 1)
        return _MARGIN + across * (end - _MARGIN), _HEIGHT - _MARGIN - up * (_HEIGHT - 2 * _MARGIN)

    places = [place(dot) for dot in dots]
    taken = [(x - _RADIUS, y - _RADIUS, x + _RADIUS, y + _RADIUS) for x, y in places]
    marks, names = [], []
    for dot, (x, y) in zip(dots, places, strict=True):
        name, weight = html.escape(dot.name), ' font-weight="600"' if dot.is_marked else ""
        marks.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{_RADIUS}" fill="{_MARK if dot.is_marked else _PLAIN}">'
            f"<title>{name}: {html.escape(x_name)} {dot.x:.4g}, {html.escape(y_name)} {dot.y:.4g}</title></circle>"
        )
        found = _free_box(len(dot.name), x, y, taken)
        if found is not None:
            box, anchor = found
            taken.append(box)
            at = {"start": box[0], "middle": (box[0] + box[2]) / 2, "end": box[2]}[anchor]
            names.append(f'<text x="{at:.1f}" y="{box[3] - 3:.1f}" text-anchor="{anchor}"{weight}>{name}</text>')
    bottom = _HEIGHT - _MARGIN + 12
    axes = (
        f'<path d="M{_MARGIN - 12} {_MARGIN / 2} V{bottom} H{_WIDTH - _MARGIN}" fill="none" stroke="#8889"/>'
        f'<text x="{_WIDTH - _MARGIN}" y="{bottom + 28}" text-anchor="end">{html.escape(x_name)}</text>'
        f'<text x="0" y="14">{html.escape(y_name)}</text>'
    )
    xs = [dot.x for dot in dots]
    ends = "".join(
        f'<text x="{x}" y="{y}" text-anchor="{anchor}" opacity=".7">{value:.4g}</text>'
        for x, y, anchor, value in (
            (_MARGIN, bottom + 14, "middle", min(xs)),
            (end, bottom + 14, "middle", max(xs)),
            (_MARGIN - 16, _HEIGHT - _MARGIN + 4, "end", low),
            (_MARGIN - 16, _MARGIN + 4, "end", high),
        )
    )
    return _svg(_HEIGHT, f"{y_name} over {x_name}", axes + ends + "".join(reversed(marks)) + "".join(names))


def bars(counts: Mapping[str, int], name: str) -> str:
    """Draw a bar for each count, in their order; a bar tells its name when pointed at. Returns an svg element."""
    highest = max(counts.values(), default=0)
    if highest < 1:
        return ""
    step = (_WIDTH - 2 * _MARGIN) / len(counts)
    room = _BARS_HEIGHT - _MARGIN
    drawn = []
    for number, (label, count) in enumerate(counts.items()):
        height = room * count / highest
        drawn.append(
            f'<rect x="{_MARGIN + number * step:.2f}" y="{_BARS_HEIGHT - 24 - height:.1f}" width="{max(step * 0.85, 0.3):.2f}" '
            f'height="{height:.1f}" fill="{_PLAIN}"><title>{html.escape(label)}: {count:,}</title></rect>'
        )
    texts = (
        f'<path d="M{_MARGIN} {_BARS_HEIGHT - 24} H{_WIDTH - _MARGIN}" stroke="#8889"/>'
        f'<text x="{_MARGIN - 6}" y="{_BARS_HEIGHT - 24 - room + 10}" text-anchor="end" opacity=".7">{highest:,}</text>'
        f'<text x="{_MARGIN - 6}" y="{_BARS_HEIGHT - 24}" text-anchor="end" opacity=".7">0</text>'
        f'<text x="{_MARGIN}" y="{_BARS_HEIGHT - 6}">{html.escape(name)}</text>'
    )
    return _svg(_BARS_HEIGHT, name, "".join(drawn) + texts)


_Box = tuple[float, float, float, float]  # left, top, right, bottom


def _free_box(letters: int, x: float, y: float, taken: Sequence[_Box]) -> tuple[_Box, str] | None:
    """Return where a name fits beside the dot at (x, y), and the end of it that stays there; None if nowhere.

    letters: of the name; how wide they are is a guess, since each browser has its own font.
    """
    width, gap = letters * _LETTER, _RADIUS + 3
    right, left = x + gap, x - gap - width
    starts = [(right, y - 7, "start"), (left, y - 7, "end")]
    starts += [(x - width / 2, y - gap - _LINE, "middle"), (x - width / 2, y + gap - 2, "middle")]
    starts += [
        (right - 3, y - 16, "start"),
        (right - 3, y + 2, "start"),
        (left + 3, y - 16, "end"),
        (left + 3, y + 2, "end"),
    ]
    for start, top, anchor in starts:
        box = (start, top, start + width, top + _LINE)
        is_inside = start >= _MARGIN - 10 and box[2] <= _WIDTH and top >= 18 and box[3] <= _HEIGHT - _MARGIN + 12
        if is_inside and not any(_overlap(box, other) for other in taken):
            return box, anchor
    return None


def _overlap(a: _Box, b: _Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _svg(height: int, label: str, content: str) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" role="img" '
        f'aria-label="{html.escape(label)}" font-family="system-ui, sans-serif" font-size="12" fill="currentColor">'
        f"{content}</svg>"
    )
