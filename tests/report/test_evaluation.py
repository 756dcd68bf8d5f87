"""The page of an evaluation is whole, safe and complete."""

from __future__ import annotations

from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest

from varcli.metrics.published import published_at
from varcli.metrics.result import EvalResult, Neighbours
from varcli.report.evaluation import write_report

NASTY = "<script>alert(1)</script>&\"'"
RESULT = EvalResult(
    metrics={"fid": 2.2, "inception_score": 280.0, "precision": 0.8, "recall": 0.6},
    skipped={"sfid": "no spatial statistics"},
    floor={"fid": 1.8},
    floor_images="10 of others",
    samples={"path": NASTY, "count": 50_000, "settings": {"cfg": 1.5, "model": NASTY}},
    reference={"path": "VIRTUAL.npz", "sha256": "0" * 64},
    features={"network": "inception", "weights_sha256": "1" * 64},
    warnings=(f"beware of {NASTY}",),
    versions={"varcli": "0.1.0"},
    published=published_at(256),
)


class Checked(HTMLParser):
    """Fails on tags that are not closed in their order; keeps tags and texts."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.texts, self.links = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img", "path"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def read(path) -> Checked:
    page = Checked()
    page.feed(path.read_text())
    assert page.open == []
    return page


def test_the_page_holds_numbers_warnings_settings_and_published_rows(tmp_path):
    write_report(RESULT, tmp_path / "report.html")
    page = read(tmp_path / "report.html")
    text = " ".join(page.texts)
    for wanted in ("2.2000", "no spatial statistics", "beware of", "VAR-d16", "validation data", "cfg 1.5", "0" * 64):
        assert wanted in text
    assert "svg" in page.tags and "script" not in page.tags
    assert NASTY in text  # shown, not run


def test_nothing_is_loaded_from_elsewhere(tmp_path):
    image = np.zeros((3, 8, 8), np.uint8)
    found = Neighbours(sample=image, nearest=(image, image), distances=(0.0, 1.5))
    write_report(replace(RESULT, neighbours=(found,)), tmp_path / "report.html")
    page = read(tmp_path / "report.html")
    assert page.tags.count("img") == 3
    assert all(link.startswith("data:image/png;base64,") for link in page.links)


@pytest.mark.parametrize("changes", [{"published": ()}, {"reference": None, "floor": {}, "floor_images": None}])
def test_parts_that_are_missing_are_left_out(tmp_path, changes):
    write_report(replace(RESULT, warnings=(), skipped={}, **changes), tmp_path / "report.html")
    assert "Read this first" not in " ".join(read(tmp_path / "report.html").texts)
