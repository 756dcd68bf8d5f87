"""Charts as SVG, which pages show and browsers open."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass

_WIDTH, _HEIGHT, _MARGIN = 640, 320, 48  # in the chart's own units


@dataclass(frozen=True, kw_only=True)
class Dot:
    """One point of a scatter chart."""

    x: float
    y: float
    name: str
    is_marked: bool = False  # drawn in the other colour


def scatter(dots: Sequence[Dot], x_name: str, y_name: str) -> str:
    """Draw named dots; x grows to the right, y upwards. Returns an svg element that carries its own colours."""
    xs, ys = [dot.x for dot in dots], [dot.y for dot in dots]

    def place(dot: Dot) -> tuple[float, float]:
        across = (dot.x - min(xs)) / ((max(xs) - min(xs)) or 1)
        up = (dot.y - min(ys)) / ((max(ys) - min(ys)) or 1)
        return _MARGIN + across * (_WIDTH - 3.5 * _MARGIN), _HEIGHT - _MARGIN - up * (_HEIGHT - 2 * _MARGIN)

    marks = []
    for dot in dots:
        x, y = place(dot)
        name = html.escape(dot.name)
        marks.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{"#d2452d" if dot.is_marked else "#3b77bc"}">'
            f"<title>{name}: {html.escape(x_name)} {dot.x:.4g}, {html.escape(y_name)} {dot.y:.4g}</title></circle>"
            f'<text x="{x + 8:.1f}" y="{y + 4:.1f}">{name}</text>'
        )
    bottom, right = _HEIGHT - _MARGIN + 12, _WIDTH - _MARGIN
    axes = (
        f'<path d="M{_MARGIN - 12} {_MARGIN / 2} V{bottom} H{right}" fill="none" stroke="#8889"/>'
        f'<text x="{right}" y="{bottom + 24}" text-anchor="end">{html.escape(x_name)}</text>'
        f'<text x="0" y="14">{html.escape(y_name)}</text>'
    )
    ends = "".join(
        f'<text x="{x}" y="{y}" text-anchor="{anchor}" opacity=".6">{value:.4g}</text>'
        for x, y, anchor, value in (
            (_MARGIN, bottom + 14, "middle", min(xs)),
            (_WIDTH - 2.5 * _MARGIN, bottom + 14, "middle", max(xs)),
            (_MARGIN - 16, _HEIGHT - _MARGIN + 4, "end", min(ys)),
            (_MARGIN - 16, _MARGIN + 4, "end", max(ys)),
        )
    )
    label = html.escape(f"{y_name} over {x_name}")
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}" '
        f'font-family="system-ui, sans-serif" font-size="12" fill="currentColor">{axes}{ends}{"".join(marks)}</svg>'
    )
