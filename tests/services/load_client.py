"""A client for load: many requests at once over plain sockets, with stamps, and nothing that could hang.

Every request gets a `Reply`, whatever became of it. Server-sent frames are read as bytes and counted, since
decoding each one would cost more than the service does.
"""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass, field
from typing import Any

GIVE_UP_S = 60.0


@dataclass(slots=True)
class Reply:
    """Status 0: no answer at all. `is_whole`: it ended as its kind of answer should."""

    status: int = 0
    sent_s: float = 0.0
    headers_s: float = 0.0
    first_s: float = 0.0
    pieces_s: list[float] = field(default_factory=list)
    """When each piece of a stream came."""
    end_s: float = 0.0
    num_frames: int = 0
    body: bytes = b""
    retry_after: str | None = None
    is_whole: bool = False

    @property
    def code(self) -> str:
        """The error's code, "" where there is none."""
        place = self.body.rfind(b'{"error":')
        return "" if place < 0 else str(json.loads(self.body[place:].split(b"\n")[0])["error"]["code"])


class Connection:
    """One connection, opened anew where the service closed it."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def post(self, path: str = "/generate", **fields: Any) -> Reply:
        reply = Reply(sent_s=time.monotonic())
        try:
            async with asyncio.timeout(GIVE_UP_S):
                await self._exchange(reply, path, json.dumps(fields).encode())
        except (OSError, asyncio.IncompleteReadError):
            self.cut()
        reply.end_s = time.monotonic()
        return reply

    def cut(self) -> None:
        """Leave in the middle of whatever is going on."""
        if self._writer is not None:
            self._writer.transport.abort()
        self._reader = self._writer = None

    async def _exchange(self, reply: Reply, path: str, body: bytes) -> None:
        if self._reader is None or self._writer is None:
            self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port)
        reader = self._reader
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        self._writer.write(head.encode() + body)
        lines = (await reader.readuntil(b"\r\n\r\n")).decode().lower().split("\r\n")
        headers = dict(line.split(": ", 1) for line in lines[1:] if line)
        reply.status = int(lines[0].split()[1])
        reply.headers_s = time.monotonic()
        reply.retry_after = headers.get("retry-after")
        if "content-length" in headers:
            reply.body = await reader.readexactly(int(headers["content-length"]))
            reply.is_whole = True
            reply.first_s = time.monotonic()
        else:
            await self._read_stream(reply, reader)

    async def _read_stream(self, reply: Reply, reader: asyncio.StreamReader) -> None:
        tail = b""
        while True:
            piece = await reader.read(1 << 16)
            if not piece:
                raise asyncio.IncompleteReadError(b"", None)
            reply.pieces_s.append(time.monotonic())
            reply.first_s = reply.pieces_s[0]
            reply.num_frames += piece.count(b"data: {")
            tail = (tail + piece)[-4096:]
            if tail.endswith(b"0\r\n\r\n"):
                reply.body = tail
                reply.is_whole = b"data: [DONE]" in tail
                return


def ms(seconds: float) -> str:
    return f"{seconds * 1000:.1f} ms"


def quantile(values: list[float], share: float) -> float:
    """The value below which `share` of them lie."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]
