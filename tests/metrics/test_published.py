"""A result is set beside published ones of its size, and only where the protocol is theirs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from varcli.metrics.published import PUBLISHED, REAL, neighbours, published_at
from varcli.metrics.reference import Reference
from varcli.metrics.sources import ImageSource
from varcli.metrics.statistics import Statistics


def test_a_result_is_set_beside_its_neighbours_and_every_var():
    rows = neighbours(published_at(256), 5.0, around=2)
    assert [row.fid for row in rows] == sorted(row.fid for row in rows)
    names = {row.model for row in rows}
    assert {"DiT-L/2", "CDM", "VAR-d16", "VAR-d30, released", "validation data"} <= names
    assert "VQGAN, 1.4B" not in names
    assert neighbours((), 2.0) == () == published_at(64)


def test_every_row_is_possible_and_says_where_it_is_from():
    for rows in PUBLISHED.values():
        assert len({row.model for row in rows}) == len(rows)
        for row in rows:
            assert row.source and 1 < row.fid < 50
            assert row.inception_score is None or 1 < row.inception_score < 1000
            assert all(share is None or 0 < share < 1 for share in (row.precision, row.recall))
            assert row.kind == REAL or row.parameters is None or row.parameters > 50


def statistics(num_features: int) -> Statistics:
    return Statistics(mean=np.zeros(num_features), covariance=np.zeros((1, 1)), count=None)


def test_only_files_like_those_that_papers_share_count_as_theirs():
    images = ImageSource(shown="", count=10_000, height=256, width=256, read=None)
    theirs = Reference(images=images, statistics=statistics(2048), spatial_statistics=statistics(2023))
    assert theirs.is_published
    for changes in (
        {"images": None},
        {"images": replace(images, count=9_999)},
        {"images": replace(images, height=128, width=128)},
        {"statistics": None},
        {"spatial_statistics": None},
        {"record": {"network": "inception"}},
    ):
        assert not replace(theirs, **changes).is_published, changes
