"""Names as text."""

from __future__ import annotations

import os

import pytest

from varcli.data.paths import escape_path, unescape_path


@pytest.mark.parametrize(
    "name", ["plain.png", "a\nb", "back\\slash", "\\x41", "été 🙂.png", os.fsdecode(b"\xff\xfe"), "\x1b[31m", "\u202e"]
)
def test_escaping_is_one_printable_line_and_can_be_undone(name):
    text = escape_path(name)
    assert len(text.splitlines()) == 1
    assert "\x1b" not in text
    text.encode("utf-8")
    assert unescape_path(text) == name
