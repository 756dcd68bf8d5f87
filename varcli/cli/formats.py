"""How numbers and sets of images are written where results are shown to people."""

from __future__ import annotations

from typing import Any

from varcli.progress import counted


def number(value: float | None) -> str:
    """Write a metric: four decimals below 10, two above; a dash for one that is missing."""
    if value is None:
        return "-"
    return f"{value:.4f}" if abs(value) < 10 else f"{value:.2f}"


def images(described: dict[str, Any]) -> str:
    """Write what a result says of a set of images in one line: path, count, size, preparation."""
    parts = [str(described["path"])]
    if "count" in described:
        parts.append(f"{counted(described['count'], 'image')}, {described['width']} x {described['height']}")
        if described["preparation"] != "as they are":
            parts.append(str(described["preparation"]))
    if "statistics" in described:
        parts.append("stored statistics")
    return "; ".join(parts)
