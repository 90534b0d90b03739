"""Text files from the field, read the same way wherever one is taken: traces, corpora, digests, imports.

UTF-8 and UTF-16 are read with or without a byte order mark, UTF-32 with one. Lines end at LF or CRLF only:
U+2028 and its like belong to a JSON string and end nothing.
"""

from __future__ import annotations

import codecs
from pathlib import Path

from adapters.base import ConfigError

_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # begins like UTF-16's mark, so it is asked first
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


def read_text(path: Path) -> str:
    """The whole file.

    Raises:
        ConfigError: it cannot be opened, or is in no encoding that is known here.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from error
    return decode(content, path)


def decode(content: bytes, path: Path) -> str:
    """The text of a file whose bytes were read before; `path` is for the error.

    Raises:
        ConfigError: the encoding is none that is known here.
    """
    encoding = _encoding(content)
    try:
        return content.decode(encoding).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path} is not {encoding.upper()} text (byte {error.start} does not belong to it): "
            "save it as UTF-8 and try again"
        ) from error


def split_lines(text: str) -> list[str]:
    """Lines without their ends; the last one may be empty."""
    return [line.removesuffix("\r") for line in text.split("\n")]


def _encoding(content: bytes) -> str:
    for mark, encoding in _MARKS:
        if content.startswith(mark):
            return encoding
    # Without a mark, ASCII in UTF-16 shows by a zero in every second byte.
    head = content[:64]
    if len(head) >= 4 and not len(content) % 2:
        even, odd = head[0::2], head[1::2]
        if not any(odd) and all(even):
            return "utf-16-le"
        if not any(even) and all(odd):
            return "utf-16-be"
    return "utf-8"
