"""Server-sent events out of a byte stream that arrives in arbitrary pieces.

Lines end at CR, LF or CRLF only. U+2028, U+2029 and U+0085 are ordinary characters, as the event stream
format demands; `str.splitlines` would break at them.
"""

from __future__ import annotations


class EventSplitter:
    """Incremental splitter for one response body."""

    __slots__ = ("_buffer", "_data", "_skip_lf", "_started")

    def __init__(self) -> None:
        self._buffer = b""
        self._data: list[bytes] = []
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
        events: list[bytes] = []
        data = self._data
        for line in lines:
            if not line:
                if data:
                    events.append(data[0] if len(data) == 1 else b"\n".join(data))
                    data.clear()
            elif line.startswith(b"data:"):
                data.append(line[6:] if line[5:6] == b" " else line[5:])
            elif line == b"data":
                data.append(b"")
        return events
