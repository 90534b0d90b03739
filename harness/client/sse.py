"""Server-sent events out of a byte stream that arrives in arbitrary pieces.

Lines end at CR, LF or CRLF only. U+2028, U+2029 and U+0085 are ordinary characters, as the event stream
format demands; `str.splitlines` would break at them. The data of an `event: error` comes out as the error
object of the API, and lines that are no field of an event stream are kept: servers put errors there.
"""

from __future__ import annotations

from harness.client.server_words import as_error_event

MAX_LINE_BYTES = 16 << 20
MAX_STRAY_BYTES = 64 << 10
_FIELDS = (b":", b"data", b"event", b"id", b"retry")


class EventSplitter:
    """Incremental splitter for one response body."""

    __slots__ = ("_buffer", "_data", "_name", "_skip_lf", "_started", "_stray")

    def __init__(self) -> None:
        self._buffer = b""
        self._data: list[bytes] = []
        self._name = b""
        self._stray = b""
        self._skip_lf = False
        self._started = False

    def feed(self, piece: bytes) -> list[bytes]:
        """Take the next piece of the body and return the data of the events that it completes."""
        if self._skip_lf and piece:
            # The last piece ended in CR: a LF now belongs to that line end.
            self._skip_lf = False
            if piece[0] == 0x0A:
                piece = piece[1:]
        buffer = self._buffer + piece if self._buffer else piece
        if not self._started:
            if b"\xef\xbb\xbf".startswith(buffer[:3]) and len(buffer) < 3:
                self._buffer = buffer
                return []
            self._started = True
            buffer = buffer.removeprefix(b"\xef\xbb\xbf")
        if b"\r" in buffer:
            self._skip_lf = buffer.endswith(b"\r")
            buffer = buffer.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        lines = buffer.split(b"\n")
        self._buffer = lines.pop()
        if len(self._buffer) > MAX_LINE_BYTES:
            raise ValueError(f"a line of more than {MAX_LINE_BYTES >> 20} MiB without an end")
        events: list[bytes] = []
        data = self._data
        for line in lines:
            if not line:
                if any(data):  # an event without data keeps a connection alive and says nothing
                    whole = data[0] if len(data) == 1 else b"\n".join(data)
                    events.append(as_error_event(whole) if self._name == b"error" else whole)
                data.clear()
                self._name = b""
            elif line.startswith(b"data:"):
                data.append(line[6:] if line[5:6] == b" " else line[5:])
            elif line == b"data":
                data.append(b"")
            elif line.startswith(b"event:"):
                self._name = line[6:].strip()
            elif not line.startswith(_FIELDS):
                self._stray = (self._stray + line + b"\n")[:MAX_STRAY_BYTES]
        return events

    def stray_text(self) -> str:
        """What came so far and is no event, its last line included if that has no end."""
        last = b"" if self._buffer.startswith(_FIELDS) else self._buffer
        return (self._stray + last)[:MAX_STRAY_BYTES].decode("utf-8", "replace")
