"""The page of an evaluation is whole, safe and complete."""

from __future__ import annotations

import base64
import io
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image
from small_sets import draw, write_pngs

from varcli.data.samples import SamplesWriter
from varcli.metrics.evaluate import evaluate
from varcli.metrics.published import published_at
from varcli.metrics.result import EvalConfig, EvalResult, Neighbours
from varcli.report.evaluation import write_report

NASTY = "<script>alert(1)</script>&\"'"
RESULT = EvalResult(
    metrics={"fid": 2.2, "inception_score": 280.0, "precision": 0.8, "recall": 0.6},
    skipped={"sfid": "no spatial statistics"},
    floor={"fid": 1.8},
    floor_images="10 of others",
    samples={"path": NASTY, "count": 50_000, "settings": {"cfg": 1.5, "model": NASTY}},
    reference={"path": "VIRTUAL.npz", "sha256": "0" * 64},
    features={"network": "inception", "weights_sha256": "1" * 64, "precision": "float32"},
    warnings=(f"beware of {NASTY}",),
    versions={"varcli": "0.1.0"},
    published=published_at(256),
)


class Checked(HTMLParser):
    """Fails on tags that are not closed in their order; keeps tags, texts and links."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.texts, self.links, self.rows = [], [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href", "action", "data", "style")]
        assert not any(name.startswith("on") for name, _ in attrs)
        if tag == "tr":
            self.rows.append([])
        if tag not in ("meta", "img", "path"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1].append(data)


def read(path) -> Checked:
    page = Checked()
    page.feed(path.read_text(encoding="utf-8"))
    assert page.open == []
    return page


def page_of(tmp_path, **changes) -> Checked:
    write_report(replace(RESULT, **changes), tmp_path / "report.html")
    return read(tmp_path / "report.html")


def test_the_page_holds_numbers_warnings_settings_and_published_rows(tmp_path):
    page = page_of(tmp_path)
    text = " ".join(page.texts)
    for wanted in ("2.2000", "no spatial statistics", "beware of", "VAR-d16", "validation data", "0" * 64, "float32"):
        assert wanted in text
    assert ["cfg", "1.5"] in page.rows
    assert ["fid", "2.2000", "1.8000", "lower"] in page.rows
    assert "svg" in page.tags and "script" not in page.tags
    assert NASTY in text  # shown, not run


def test_the_result_stands_at_its_place_among_all_published_rows(tmp_path):
    rows = [row for row in page_of(tmp_path).rows if len(row) == 8][1:]
    fids = [float(row[2]) for row in rows]
    assert fids == sorted(fids) and len(rows) == len(published_at(256)) + 1
    assert next(row for row in rows if row[0] == "this result")[2:] == [
        *("2.2000", "280.00", "0.8000", "0.6000", "-", "50,000 samples")
    ]


def test_nothing_is_loaded_from_elsewhere_and_nothing_runs(tmp_path):
    image = np.zeros((3, 8, 8), np.uint8)
    found = Neighbours(sample=image, nearest=(image, image), distances=(0.0, 1.5))
    page = page_of(tmp_path, neighbours=(found,), class_counts={NASTY: 3, "b": 5})
    assert page.tags.count("img") == 3
    assert all(link.startswith("data:image/") for link in page.links)
    assert not {"script", "link", "iframe", "object", "form", "a"} & set(page.tags)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "default-src 'none'" in text and "url(" not in text and "@import" not in text


def test_letters_that_cannot_be_shown_do_not_stop_the_page(tmp_path):
    page = page_of(tmp_path, samples={"path": "a\x00b\ud800\u202ec", "count": 3}, warnings=("\x1b[31mred",))
    text = " ".join(page.texts)
    assert "a\ufffdb\ufffd\ufffdc" in text and "\x1b" not in text


def test_pictures_are_small_and_decode_to_what_they_show(tmp_path):
    image = np.full((3, 400, 300), 90, np.uint8)
    page = page_of(tmp_path, neighbours=(Neighbours(sample=image, nearest=(), distances=()),))
    (link,) = page.links
    with Image.open(io.BytesIO(base64.b64decode(link.split(",")[1]))) as picture:
        assert picture.size == (96, 128)
        assert abs(picture.convert("RGB").getpixel((40, 40))[0] - 90) <= 2


@pytest.mark.parametrize(
    ("counts", "words", "has_bars"),
    [({"a": 5, "b": 5}, "2 classes with 5 each", False), ({"a": 1, "b": 5}, "2 classes with 1 to 5 each", True)],
)
def test_unequal_classes_are_drawn(tmp_path, counts, words, has_bars):
    page = page_of(tmp_path, class_counts=counts)
    assert words in " ".join(page.texts)
    assert page.tags.count("rect") == (2 if has_bars else 0)


def test_samples_are_marked_with_how_they_came_about(tmp_path):
    settings = {"reject": "1/4", "fp8": True}
    result = replace(RESULT, samples={**RESULT.samples, "path": "mine", "settings": settings})
    assert (result.mark, replace(RESULT, samples={"path": "mine", "count": 3}).mark) == ("-re-fp8", "")
    page = page_of(tmp_path, samples=result.samples)
    assert "mine (-re: 1/4 of the candidates kept; -fp8: drawn with products in FP8)" in " ".join(page.texts)
    assert any("mine-re-fp8" in row for row in page.rows)


@pytest.mark.parametrize("changes", [{"published": ()}, {"reference": None, "floor": {}, "floor_images": None}])
def test_parts_that_are_missing_are_left_out(tmp_path, changes):
    page = page_of(tmp_path, warnings=(), skipped={}, **changes)
    text = " ".join(page.texts)
    assert "traps that are looked for was seen" in text
    assert "Nearest real images" not in text and "Samples of each class" not in text
    assert "img" not in page.tags


def test_an_evaluation_of_images_on_disk_makes_a_whole_page(tmp_path):
    with SamplesWriter(tmp_path / "samples", {"seed": 5, "cfg": 1.5, "model": NASTY}) as writer:
        pairs = [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2)]
        for pair, image in zip(pairs, draw(5, seed=1).transpose(0, 3, 1, 2)):
            writer.write(*pair, image)
        writer.finish(pairs, {"classes": ["ant", "<b>bee"]})
    for name, seed in (("ant", 2), ("<b>bee", 3)):
        write_pngs(tmp_path / "real" / "val" / name, draw(6, seed=seed))
    config = EvalConfig(reference=str(tmp_path / "real"), features="lite0", device="cpu", neighbours=3)
    result = evaluate(tmp_path / "samples", config)
    assert result.class_counts == {"ant": 2, "<b>bee": 3} == result.to_json()["class_counts"]
    write_report(result, tmp_path / "report.html")
    page = read(tmp_path / "report.html")
    assert page.tags.count("img") == 3 * 6
    assert ["seed", "5"] in page.rows and ["model", NASTY] in page.rows
    assert "2 classes with 2 to 3 each." in page.texts
    assert "b" not in page.tags
    assert not evaluate(tmp_path / "samples", replace(config, neighbours=0)).neighbours
