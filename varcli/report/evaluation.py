"""An evaluation as one HTML page: the numbers, everything that moves them, and pictures; nothing is loaded from elsewhere."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from varcli.artifacts.write import write_text
from varcli.metrics.compute import larger_is_better
from varcli.metrics.published import Published
from varcli.metrics.result import EvalResult, Neighbours
from varcli.report.charts import Dot, scatter

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8889; --mark: #d2452d; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2.5rem; }
table { border-collapse: collapse; display: block; overflow-x: auto; }
th, td { text-align: left; padding: .25rem .9rem .25rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
tr.own td { font-weight: 600; }
td.value { overflow-wrap: anywhere; }
ul.warnings { border-left: 3px solid var(--mark); padding-left: 1.6rem; }
svg { max-width: 100%; height: auto; }
figure { display: inline-flex; gap: .3rem; align-items: end; margin: 0 1rem 1rem 0; }
figure img { width: 64px; height: 64px; image-rendering: pixelated; } figure img:first-child { margin-right: .6rem; }
p.note { color: var(--soft); }
"""
_SHOWN_SIDE = 128  # pixels of a picture in the page, at most


def write_report(result: EvalResult, path: Path, title: str = "varcli eval") -> None:
    """Write `result` as a self-contained HTML page, atomically. Raises ArtifactError if it cannot be written."""
    sections = [
        f"<h1>{_text(title)}</h1>",
        f'<p class="note">{_text(_headline(result))}</p>',
        _section("Numbers", _metrics(result)),
        _section("Read this first", _warnings(result.warnings)),
        _section("Beside published results", _published(result)),
        _section("What the numbers stand for", _facts(result)),
        _section("Nearest real images", _neighbours(result.neighbours)),
    ]
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_text(title)}</title><style>{_STYLE}</style></head>\n<body>\n"
        + "\n".join(sections)
        + "\n</body></html>\n"
    )
    write_text(Path(path), page)


def _headline(result: EvalResult) -> str:
    count = result.samples.get("count")
    images = f"{count:,} images" if isinstance(count, int) else "statistics"
    against = f" against {result.reference['path']}" if result.reference else ""
    return f"{images} of {result.samples['path']}{against}, in {result.features['network']} features"


def _metrics(result: EvalResult) -> str:
    network = result.features["network"]
    rows = []
    for name, value in result.metrics.items():
        better = "higher" if larger_is_better(name, network) else "lower"
        rows.append((name, _number(value), _number(result.floor.get(name)), better))
    rows += [(name, "-", "-", reason) for name, reason in result.skipped.items()]
    floor = f'<p class="note">Real images: {_text(result.floor_images)}.</p>' if result.floor_images else ""
    return _table(("metric", "samples", "real images", "better"), rows, numbers=(1, 2)) + floor


def _warnings(warnings: Sequence[str]) -> str:
    items = "".join(f"<li>{_text(warning)}</li>" for warning in warnings)
    return f'<ul class="warnings">{items}</ul>' if items else ""


def _published(result: EvalResult) -> str:
    if not result.published:
        return ""
    own = Published(
        kind="this result",
        model=str(result.samples["path"]),
        fid=result.metrics["fid"],
        inception_score=result.metrics.get("inception_score"),
        precision=result.metrics.get("precision"),
        recall=result.metrics.get("recall"),
        source=f"{result.samples.get('count', 0):,} samples",
    )
    ranked = sorted([*result.published, own], key=lambda row: row.fid)
    head = ("family", "model", "FID", "IS", "precision", "recall", "million parameters", "source")
    rows = [
        (
            row.kind,
            row.model,
            *(_number(value) for value in (row.fid, row.inception_score, row.precision, row.recall)),
            f"{row.parameters:,.0f}" if row.parameters else "-",
            row.source,
        )
        for row in ranked
    ]
    return _chart(ranked, own) + _table(head, rows, numbers=(2, 3, 4, 5, 6), own=ranked.index(own))


def _chart(rows: Sequence[Published], own: Published) -> str:
    dots = [
        Dot(x=row.fid, y=row.inception_score, name="this result" if row is own else row.model, is_marked=row is own)
        for row in rows
        if row.inception_score is not None
    ]
    return scatter(dots, "FID (lower is better)", "Inception Score") if own.inception_score is not None else ""


def _facts(result: EvalResult) -> str:
    parts = {"samples": result.samples, "reference": result.reference or {}, "features": result.features}
    parts["versions"] = result.versions
    rows = [
        (group if number == 0 else "", name.replace("_", " "), _value(value))
        for group, values in parts.items()
        for number, (name, value) in enumerate(values.items())
    ]
    return _table(("", "", ""), rows)


def _neighbours(found: Sequence[Neighbours]) -> str:
    figures = []
    for entry in found:
        pictures = "".join(
            f'<img alt="real image at distance {distance:.3g}" title="distance {distance:.3g}" src="{_picture(image)}">'
            for image, distance in zip(entry.nearest, entry.distances, strict=True)
        )
        figures.append(f'<figure><img alt="sample" src="{_picture(entry.sample)}">{pictures}</figure>')
    if not figures:
        return ""
    note = "A sample, then the real images nearest to it in the features: a copy would show its original first."
    return f'<p class="note">{note}</p>' + "".join(figures)


def _picture(image: np.ndarray) -> str:
    picture = Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0)))
    picture.thumbnail((_SHOWN_SIDE, _SHOWN_SIDE))
    file = io.BytesIO()
    picture.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def _table(
    head: Sequence[str], rows: Iterable[Sequence[str]], numbers: Sequence[int] = (), own: int | None = None
) -> str:
    kinds = ["number" if index in numbers else "value" for index in range(len(head))]
    cells = "".join(f'<th class="{kind}">{_text(name)}</th>' for kind, name in zip(kinds, head, strict=True))
    body = "".join(
        f"<tr{' class=own' if number == own else ''}>"
        + "".join(f'<td class="{kind}">{_text(cell)}</td>' for kind, cell in zip(kinds, row, strict=True))
        + "</tr>"
        for number, row in enumerate(rows)
    )
    return f"<table>{f'<tr>{cells}</tr>' if any(head) else ''}{body}</table>"


def _section(title: str, content: str) -> str:
    return f"<h2>{_text(title)}</h2>\n{content}" if content else ""


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_value(entry)}" for name, entry in value.items())
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if abs(value) < 10 else f"{value:.2f}"


def _text(value: Any) -> str:
    return html.escape(str(value))
