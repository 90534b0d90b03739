"""Text without half characters, which every encoder takes."""

from __future__ import annotations


def valid_unicode(text: str) -> str:
    """JSON can carry half a surrogate pair, which no encoder takes: U+FFFD instead."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text
