"""Charts are whole, place dots where their numbers say, and keep names apart."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ElementTree

from varcli.metrics.published import published_at
from varcli.report.charts import Dot, bars, scatter

SVG = "{http://www.w3.org/2000/svg}"


def circles(text: str) -> dict[str, tuple[float, float]]:
    found = {}
    for circle in ElementTree.fromstring(text).iter(f"{SVG}circle"):
        found[circle.find(f"{SVG}title").text.split(":")[0]] = (float(circle.get("cx")), float(circle.get("cy")))
    return found


def test_larger_numbers_lie_to_the_right_and_above():
    places = circles(scatter([Dot(x=1, y=1, name="a"), Dot(x=10, y=2, name="b"), Dot(x=100, y=3, name="c")], "x", "y"))
    assert places["a"][0] < places["b"][0] < places["c"][0]
    assert places["a"][1] > places["b"][1] > places["c"][1]


def test_a_logarithmic_axis_spreads_by_ratios():
    dots = [Dot(x=1, y=1, name="a"), Dot(x=10, y=2, name="b"), Dot(x=100, y=3, name="c")]
    a, b, c = (place[0] for place in circles(scatter(dots, "x", "y", log_x=True)).values())
    assert math.isclose(abs(b - a), abs(c - b), abs_tol=0.2)


def test_no_two_names_lie_on_one_another_and_the_marked_one_is_there():
    dots = [Dot(x=row.fid, y=row.inception_score, name=row.model) for row in published_at(256) if row.inception_score]
    dots.append(Dot(x=2.1, y=300.0, name="mine", is_marked=True))
    root = ElementTree.fromstring(scatter(dots, "FID", "IS", log_x=True))
    models = {dot.name for dot in dots}
    boxes = []
    for text in root.iter(f"{SVG}text"):
        if text.text in models:
            x, y, width = float(text.get("x")), float(text.get("y")), 6 * len(text.text)
            x -= width * ("start", "middle", "end").index(text.get("text-anchor")) / 2
            boxes.append((x, y - 9, x + width, y + 2))
    names = [text.text for text in root.iter(f"{SVG}text")]
    assert "mine" in names and len(boxes) > len(dots) / 2
    for number, (left, top, right, bottom) in enumerate(boxes):
        for other in boxes[:number]:
            assert right <= other[0] or other[2] <= left or bottom <= other[1] or other[3] <= top
    assert len(circles(scatter(dots, "FID", "IS"))) == len(dots)


def test_odd_input_still_is_a_chart():
    nasty = "<&\"'>"
    text = scatter([Dot(x=1, y=1, name=nasty), Dot(x=math.nan, y=1, name="none")], nasty, "y")
    assert list(circles(text)) == [nasty]
    assert scatter([], "x", "y") == scatter([Dot(x=math.inf, y=1, name="a")], "x", "y") == ""


def test_bars_are_as_high_as_their_counts():
    root = ElementTree.fromstring(bars({"a": 10, "<b>": 5, "c": 0}, "classes"))
    heights = [float(rect.get("height")) for rect in root.iter(f"{SVG}rect")]
    assert heights[0] == 2 * heights[1] and heights[2] == 0
    assert [title.text for title in root.iter(f"{SVG}title")] == ["a: 10", "<b>: 5", "c: 0"]
    assert bars({}, "classes") == bars({"a": 0}, "classes") == ""
    assert len(list(ElementTree.fromstring(bars({str(n): n for n in range(1000)}, "c")).iter(f"{SVG}rect"))) == 1000
