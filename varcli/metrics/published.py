"""Published results on class-conditional ImageNet, so that a number can be read beside those it competes with.

Sources: arXiv:2404.02905, Tables 1 and 2, unless a row says otherwise. All are FIDs of 50,000 samples against the ADM
reference files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

_VAR = "arXiv:2404.02905"


@dataclass(frozen=True, kw_only=True)
class Published:
    """One row of a paper's table."""

    kind: str  # family of models
    model: str
    fid: float
    inception_score: float | None = None
    precision: float | None = None
    recall: float | None = None
    parameters: float | None = None  # millions
    source: str = _VAR


def _row(
    kind: str,
    model: str,
    fid: float,
    score: float | None = None,
    precision: float | None = None,
    recall: float | None = None,
    parameters: float | None = None,
    source: str = _VAR,
) -> Published:
    return Published(
        kind=kind,
        model=model,
        fid=fid,
        inception_score=score,
        precision=precision,
        recall=recall,
        parameters=parameters,
        source=source,
    )


PUBLISHED = {
    256: (
        _row("GAN", "BigGAN", 6.95, 224.5, 0.89, 0.38, 112),
        _row("GAN", "GigaGAN", 3.45, 225.5, 0.84, 0.61, 569),
        _row("GAN", "StyleGAN-XL", 2.30, 265.1, 0.78, 0.53, 166),
        _row("diffusion", "ADM", 10.94, 101.0, 0.69, 0.63, 554),
        _row("diffusion", "LDM-4-G", 3.60, 247.7, None, None, 400),
        _row("diffusion", "DiT-L/2", 5.02, 167.2, 0.75, 0.57, 458),
        _row("diffusion", "DiT-XL/2", 2.27, 278.2, 0.83, 0.57, 675),
        _row("masked", "MaskGIT", 6.18, 182.1, 0.80, 0.51, 227),
        _row("raster", "VQGAN", 15.78, 74.3, None, None, 1400),
        _row("raster", "ViTVQ-re", 3.04, 227.4, None, None, 1700),
        _row("raster", "RQ-Transformer", 7.55, 134.0, None, None, 3800),
        _row("raster", "LlamaGen-3B (384 px)", 2.18, None, None, None, 3100, "LlamaGen's README"),
        _row("VAR", "VAR-d16", 3.30, 274.4, 0.84, 0.51, 310),
        _row("VAR", "VAR-d20", 2.57, 302.6, 0.83, 0.56, 600),
        _row("VAR", "VAR-d24", 2.09, 312.9, 0.82, 0.59, 1000),
        _row("VAR", "VAR-d30", 1.92, 323.1, 0.82, 0.59, 2000),
        _row("VAR", "VAR-d30, rejection sampling", 1.73, 350.2, 0.82, 0.60, 2000),
        _row("real images", "validation data", 1.78, 236.9, 0.75, 0.67),
    ),
    512: (
        _row("GAN", "BigGAN", 8.43, 177.9),
        _row("diffusion", "ADM", 23.24, 101.0),
        _row("diffusion", "DiT-XL/2", 3.04, 240.8, None, None, 675),
        _row("masked", "MaskGIT", 7.32, 156.0, None, None, 227),
        _row("raster", "VQGAN", 26.52, 66.8),
        _row("VAR", "VAR-d36-s", 2.63, 303.2, None, None, 2300),
    ),
}
"""Rows by image side in pixels."""


def beside(metrics: Mapping[str, float], side: int, around: int = 3) -> tuple[Published, ...]:
    """Return published rows to read a result beside: the nearest in FID, every VAR, and real images; best first.

    around: rows on either side of the result. Empty if there is no FID or nothing is published at this side.
    """
    rows = sorted(PUBLISHED.get(side, ()), key=lambda row: row.fid)
    if "fid" not in metrics or not rows:
        return ()
    place = sum(row.fid < metrics["fid"] for row in rows)
    near = rows[max(0, place - around) : place + around]
    return tuple(row for row in rows if row in near or row.kind in ("VAR", "real images"))
