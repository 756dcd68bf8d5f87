"""An evaluation as one HTML page: the numbers, everything that moves them, and pictures; nothing is loaded from elsewhere."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, features

from varcli.artifacts.write import prepare_folder, write_text
from varcli.data.paths import escape_path
from varcli.errors import ArtifactError
from varcli.metrics.cautions import CHECKS, PUBLISHED_COUNT
from varcli.metrics.compute import larger_is_better
from varcli.metrics.published import OWN, REAL, Published
from varcli.metrics.result import EvalResult, Neighbours
from varcli.report.charts import Dot, bars, scatter

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --tint: #8881; --mark: #d2452d; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: 0; } h2 { font-size: 1.1rem; margin: 2.5rem 0 .5rem; }
.scroll { overflow-x: auto; } .scroll svg { display: block; width: 100%; min-width: 34rem; height: auto; }
table { border-collapse: collapse; }
th, td { text-align: left; padding: .3rem 1rem .3rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { font-weight: 600; } tr.group th { padding-top: 1rem; } .ranked td { white-space: nowrap; }
tr.own td { font-weight: 600; white-space: normal; background: var(--tint); }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.facts td { overflow-wrap: anywhere; } .facts td:first-child { white-space: nowrap; }
.warnings { border-left: 3px solid var(--mark); padding-left: 1.6rem; } .warnings li { margin-bottom: .5rem; }
figure { display: grid; grid-template-columns: repeat(6, minmax(0, 6rem)); gap: .3rem; margin: 0 0 .8rem; }
figure img { width: 100%; } figure img:first-child { width: calc(100% - .4rem); }
.note { opacity: .75; }
"""
# the page runs nothing and fetches nothing, whatever a name in it says
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_SHOWN_SIDE = 128  # pixels of a picture in the page, at most


def check_report_path(path: Path) -> None:
    """Make the folder that a report goes to: an evaluation that takes an hour should not fail at its end.

    Raises ArtifactError if the report cannot be written there.
    """
    if Path(path).is_dir():
        raise ArtifactError(f"the report `{escape_path(str(path))}` is a folder", "name a file, e.g. report.html")
    prepare_folder(Path(path).parent, sweep=False)


def write_report(result: EvalResult, path: Path, title: str = "varcli eval") -> None:
    """Write `result` as a self-contained HTML page, atomically. Raises ArtifactError if it cannot be written."""
    check_report_path(path)
    sections = [
        f"<h1>{_text(title)}</h1>",
        f'<p class="note">{_text(_headline(result))}</p>',
        _section("Numbers", _metrics(result)),
        _section("Read this first", _warnings(result.warnings)),
        _section("Beside published results", _published(result)),
        _section("What the numbers stand for", _facts(result)),
        _section("Samples of each class", _classes(result.class_counts)),
        _section("Nearest real images", _neighbours(result.neighbours)),
    ]
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f"<title>{_text(title)}</title><style>{_STYLE}</style></head>\n<body><main>\n"
        + "\n".join(section for section in sections if section)
        + "\n</main></body></html>\n"
    )
    write_text(Path(path), page)


def _headline(result: EvalResult) -> str:
    count = result.samples.get("count")
    images = f"{count:,} images" if isinstance(count, int) else "statistics"
    against = f" against {result.reference['path']}" if result.reference else ""
    return f"{images} of {result.samples['path']}{_marked(result)}{against}, in {result.features['network']} features"


def _marked(result: EvalResult) -> str:
    reasons = "; ".join(f"{mark}: {reason}" for mark, reason in result.marks.items())
    return f" ({reasons})" if reasons else ""


def _metrics(result: EvalResult) -> str:
    network = result.features["network"]
    rows = []
    for name, value in result.metrics.items():
        better = "higher" if larger_is_better(name, network) else "lower"
        rows.append((name, _number(value), _number(result.floor.get(name)), better))
    rows += [(name, "-", "-", f"skipped: {reason}") for name, reason in result.skipped.items()]
    floor = f"Real images in the samples' place: {result.floor_images}." if result.floor_images else ""
    return _table(("metric", "samples", "real images", "better"), rows, numbers=(1, 2)) + _note(floor)


def _warnings(warnings: Sequence[str]) -> str:
    if not warnings:
        return _note(f"None of the {len(CHECKS)} traps that are looked for was seen.")
    return f'<ul class="warnings">{"".join(f"<li>{_text(warning)}</li>" for warning in warnings)}</ul>'


def _published(result: EvalResult) -> str:
    if not result.published:
        return _note(
            "None: they are of Inception features with the published weights, of class-conditional ImageNet at 256 or 512 "
            "pixels, against the ADM reference files."
        )
    count = result.samples["count"]
    own = Published(
        kind=OWN,
        model=f"{result.samples['path']}{result.mark}",
        fid=result.metrics["fid"],
        inception_score=result.metrics.get("inception_score"),
        precision=result.metrics.get("precision"),
        recall=result.metrics.get("recall"),
        source=f"{count:,} samples",
    )
    ranked = sorted([*result.published, own], key=lambda row: row.fid)
    head = ("family", "model", "FID", "IS", "precision", "recall", "million parameters", "source")
    rows = [
        (
            row.kind,
            row.model,
            *(_number(value) if row is own else _short(value) for value in (row.fid, row.inception_score)),
            *(_number(value) if row is own else _short(value) for value in (row.precision, row.recall)),
            f"{row.parameters:,.0f}" if row.parameters else "-",
            row.source,
        )
        for row in ranked
    ]
    table = _table(head, rows, numbers=(2, 3, 4, 5, 6), own=ranked.index(own))
    of = f"Published FIDs are of {PUBLISHED_COUNT:,} samples, this one of {count:,}; each row with the guidance it chose."
    return _chart(ranked, own) + _note(of) + table


def _chart(rows: Sequence[Published], own: Published) -> str:
    if own.inception_score is None:
        return ""
    # real images and VAR keep their names before the others
    ranked = sorted(rows, key=lambda row: (row.kind != REAL, row.kind != "VAR"))
    dots = [
        Dot(x=row.fid, y=row.inception_score, name=OWN if row is own else row.model, is_marked=row is own)
        for row in ranked
        if row.inception_score is not None and row.fid > 0
    ]
    return f'<div class="scroll">{scatter(dots, "FID (lower is better)", "Inception Score", log_x=True)}</div>'


def _facts(result: EvalResult) -> str:
    samples = {name: value for name, value in result.samples.items() if name != "settings"}
    settings = result.samples.get("settings") or {"": "not known: the samples have no manifest of `varcli sample`"}
    groups: dict[str, Mapping[str, Any]] = {
        "samples": samples,
        "drawn with": settings,
        "reference": result.reference or {},
        "features": result.features,
        "versions": result.versions,
    }
    rows = "".join(
        f'<tr class="group"><th colspan="2">{_text(group)}</th></tr>'
        + "".join(
            f"<tr><td>{_text(str(name).replace('_', ' '))}</td><td>{_text(_value(value))}</td></tr>"
            for name, value in values.items()
        )
        for group, values in groups.items()
        if values
    )
    return f'<div class="scroll"><table class="facts">{rows}</table></div>'


def _classes(counts: Mapping[str, int]) -> str:
    if not counts:
        return ""
    fewest, most = min(counts.values()), max(counts.values())
    if fewest == most:
        return _note(f"{len(counts):,} classes with {most:,} each.")
    note = _note(f"{len(counts):,} classes with {fewest:,} to {most:,} each.")
    return f'{note}<div class="scroll">{bars(counts, "classes in their order")}</div>'


def _neighbours(found: Sequence[Neighbours]) -> str:
    figures = []
    for entry in found:
        pictures = "".join(
            f'<img alt="real image at distance {distance:.3g}" title="distance {distance:.3g}" src="{_picture(image)}">'
            for image, distance in zip(entry.nearest, entry.distances, strict=True)
        )
        figures.append(f'<figure><img alt="sample" title="sample" src="{_picture(entry.sample)}">{pictures}</figure>')
    if not figures:
        return ""
    note = (
        "First a sample, then the real images of the reference nearest to it in the features; the copy of one would show it "
        "there. Images that are not in the reference are not looked at, and the model may have learned from those."
    )
    return _note(note) + "".join(figures)


def _picture(image: np.ndarray) -> str:
    """Return an image, uint8 (3, H, W), as the address that holds it itself."""
    picture = Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0)))
    picture.thumbnail((_SHOWN_SIDE, _SHOWN_SIDE))
    file, kind = io.BytesIO(), "webp" if features.check("webp") else "png"
    picture.save(file, kind, **({"quality": 90} if kind == "webp" else {}))
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def _table(
    head: Sequence[str], rows: Iterable[Sequence[str]], numbers: Sequence[int] = (), own: int | None = None
) -> str:
    kinds = [' class="number"' if index in numbers else "" for index in range(len(head))]
    cells = "".join(f'<th scope="col"{kind}>{_text(name)}</th>' for kind, name in zip(kinds, head, strict=True))
    marks = {own: ' class="own"'}
    body = "".join(
        f"<tr{marks.get(number, '')}>"
        + "".join(f"<td{kind}>{_text(cell)}</td>" for kind, cell in zip(kinds, row, strict=True))
        + "</tr>"
        for number, row in enumerate(rows)
    )
    kind = "" if own is None else ' class="ranked"'
    return f'<div class="scroll"><table{kind}><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table></div>'


def _section(title: str, content: str) -> str:
    return f"<h2>{_text(title)}</h2>\n{content}" if content else ""


def _note(text: str) -> str:
    return f'<p class="note">{_text(text)}</p>' if text else ""


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_value(entry)}" for name, entry in value.items())
    return "off" if value is None else str(value)


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if abs(value) < 10 else f"{value:.2f}"


def _short(value: float | None) -> str:
    """Print a number of a paper with the digits that papers have."""
    return "-" if value is None else f"{value:.2f}" if value < 50 else f"{value:.1f}"


def _text(value: Any) -> str:
    """Make any text harmless: what is no letter, sign or space is replaced, the rest escaped."""
    shown = "".join(
        letter if letter.isprintable() or letter == "\n" else "\N{REPLACEMENT CHARACTER}" for letter in str(value)
    )
    return html.escape(shown)
