"""Published results on class-conditional ImageNet, so that a number can be read beside those it competes with.

All are FIDs of 50,000 samples against the ADM reference files. Numbers of others are as that source quotes them; the
steps of guidance and truncation differ between rows, as each was tuned for its FID.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

_VAR = "arXiv:2404.02905, Table 1"
_VAR_512 = "arXiv:2404.02905, Table 2"
_VAR_README = "README of FoundationVision/VAR: the released weights"
_LLAMAGEN = "README of FoundationVision/LlamaGen"
_MAR = "README of LTH14/mar"
_RAR = "README of bytedance/1d-tokenizer"
REAL, OWN = "real images", "this result"  # kinds that are no family of models


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


def _short(kind: str, model: str, fid: float, parameters: float | None, source: str) -> Published:
    return Published(kind=kind, model=model, fid=fid, parameters=parameters, source=source)


PUBLISHED = {
    256: (
        _row("GAN", "BigGAN", 6.95, 224.5, 0.89, 0.38, 112),
        _row("GAN", "GigaGAN", 3.45, 225.5, 0.84, 0.61, 569),
        _row("GAN", "StyleGAN-XL", 2.30, 265.1, 0.78, 0.53, 166),
        _row("diffusion", "ADM", 10.94, 101.0, 0.69, 0.63, 554),
        _row("diffusion", "CDM", 4.88, 158.7, None, None, 8100),
        _row("diffusion", "LDM-4-G", 3.60, 247.7, None, None, 400),
        _row("diffusion", "DiT-L/2", 5.02, 167.2, 0.75, 0.57, 458),
        _row("diffusion", "DiT-XL/2", 2.27, 278.2, 0.83, 0.57, 675),
        _row("diffusion", "L-DiT-3B", 2.10, 304.4, 0.82, 0.60, 3000),
        _row("diffusion", "L-DiT-7B", 2.28, 316.2, 0.83, 0.58, 7000),
        _row("masked", "MaskGIT", 6.18, 182.1, 0.80, 0.51, 227),
        _row("masked", "RCG, conditional", 3.49, 215.5, None, None, 502),
        _row("raster", "VQVAE-2", 31.11, 45.0, 0.36, 0.57, 13500),
        _row("raster", "VQGAN, 227M", 18.65, 80.4, 0.78, 0.26, 227),
        _row("raster", "VQGAN, 1.4B", 15.78, 74.3, None, None, 1400),
        _row("raster", "VQGAN, rejection sampling", 5.20, 280.3, None, None, 1400),
        _row("raster", "ViTVQ", 4.17, 175.1, None, None, 1700),
        _row("raster", "ViTVQ, rejection sampling", 3.04, 227.4, None, None, 1700),
        _row("raster", "RQ-Transformer", 7.55, 134.0, None, None, 3800),
        _short("raster", "LlamaGen-B", 5.46, 111, _LLAMAGEN),
        _short("raster", "LlamaGen-3B (384 px)", 2.18, 3100, _LLAMAGEN),
        _short("raster", "RAR-B", 1.95, None, _RAR),
        _short("raster", "RAR-XXL", 1.48, None, _RAR),
        _short("masked", "MAR-B", 2.31, None, _MAR),
        _short("masked", "MAR-L", 1.78, None, _MAR),
        _short("masked", "MAR-H", 1.55, None, _MAR),
        _row("VAR", "VAR-d16", 3.30, 274.4, 0.84, 0.51, 310),
        _row("VAR", "VAR-d20", 2.57, 302.6, 0.83, 0.56, 600),
        _row("VAR", "VAR-d24", 2.09, 312.9, 0.82, 0.59, 1000),
        _row("VAR", "VAR-d30", 1.92, 323.1, 0.82, 0.59, 2000),
        _row("VAR", "VAR-d30, rejection sampling", 1.73, 350.2, 0.82, 0.60, 2000),
        _short("VAR", "VAR-d16, released", 3.55, 310, _VAR_README),
        _short("VAR", "VAR-d20, released", 2.95, 600, _VAR_README),
        _short("VAR", "VAR-d24, released", 2.33, 1000, _VAR_README),
        _short("VAR", "VAR-d30, released", 1.97, 2000, _VAR_README),
        _short("VAR", "VAR-d30, released, rejection sampling", 1.80, 2000, _VAR_README),
        _row(REAL, "validation data", 1.78, 236.9, 0.75, 0.67),
    ),
    512: (
        _row("GAN", "BigGAN", 8.43, 177.9, source=_VAR_512),
        _row("diffusion", "ADM", 23.24, 101.0, source=_VAR_512),
        _row("diffusion", "DiT-XL/2", 3.04, 240.8, None, None, 675, _VAR_512),
        _row("masked", "MaskGIT", 7.32, 156.0, None, None, 227, _VAR_512),
        _row("raster", "VQGAN", 26.52, 66.8, source=_VAR_512),
        _row("VAR", "VAR-d36-s", 2.63, 303.2, None, None, 2300, _VAR_512),
    ),
}
"""Rows by image side in pixels."""


def published_at(side: int) -> tuple[Published, ...]:
    """Return all rows for images of this side, best FID first; empty if nothing is published at it."""
    return tuple(sorted(PUBLISHED.get(side, ()), key=lambda row: row.fid))


def neighbours(rows: Sequence[Published], fid: float, around: int = 3) -> tuple[Published, ...]:
    """Return those of `rows` to read a result beside: the nearest in FID, every VAR, and real images; best first.

    around: rows on either side of the result.
    """
    ranked = sorted(rows, key=lambda row: row.fid)
    place = sum(row.fid < fid for row in ranked)
    near = ranked[max(0, place - around) : place + around]
    return tuple(row for row in ranked if row in near or row.kind in ("VAR", REAL))
