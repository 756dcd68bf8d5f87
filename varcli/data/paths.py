"""File names as text: names that are not plain text are shown and stored escaped, one a line."""

from __future__ import annotations

import re

_HIDDEN = re.compile(r"[\\\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_ESCAPE = re.compile(r"\\(?:\\|x([0-9a-f]{2})|u([0-9a-f]{4}))")


def escape_path(path: str) -> str:
    r"""Return `path` on one printable line: backslashes are doubled, what does not print becomes `\xNN` or `\uNNNN`.

    Bytes of a name that are not UTF-8 (surrogates to Python) are kept as `\udcNN`, so `unescape_path` brings them back.
    """
    return _HIDDEN.sub(_escape_one, path)


def unescape_path(text: str) -> str:
    """Undo `escape_path`."""
    return _ESCAPE.sub(lambda match: chr(int(match[1] or match[2], 16)) if match[1] or match[2] else "\\", text)


def _escape_one(match: re.Match[str]) -> str:
    character = match.group()
    if character == "\\":
        return "\\\\"
    number = ord(character)
    return f"\\x{number:02x}" if number < 0x100 else f"\\u{number:04x}"
