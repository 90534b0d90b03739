"""One HTTP/1.1 connection that stamps time where the bytes arrive, and the pool it rests in.

Bytes are stamped as they come and parsed once every connection that had some is stamped: in a burst of
tokens the last stamp does not wait for the others' parsing. httptools (C) parses HTTP; the sink of a
response reads its events and JSON.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from dataclasses import dataclass, field
from time import perf_counter
from typing import Protocol, cast

import httptools


class ResponseSink(Protocol):
    """Who listens to one response. `now_s` is on the clock of `time.perf_counter`."""

    def on_headers(self, status: int, headers: dict[str, str]) -> None: ...

    def on_body(self, piece: bytes, now_s: float) -> None: ...

    def on_end(self, problem: str | None, now_s: float) -> None:
        """Called exactly once; `problem` says why the response is not whole, None if it is."""
        ...


@dataclass(frozen=True, slots=True)
class Origin:
    """Where connections go."""

    host: str
    port: int
    is_tls: bool = False

    @property
    def host_header(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.is_tls else 80) else f"{host}:{self.port}"


class _Unread:
    """Bytes that were stamped and wait to be read, of all connections of a pool, in their order."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stamped: list[tuple[Connection, float, bytes]] = []

    def add(self, connection: Connection, data: bytes) -> None:
        if not self._stamped:
            self._loop.call_soon(self.read)
        self._stamped.append((connection, perf_counter(), data))

    def read(self) -> None:
        stamped, self._stamped = self._stamped, []
        for connection, now_s, data in stamped:
            try:
                connection.read(data, now_s)
            except Exception as error:  # what goes wrong on one is not the others' business
                connection.abort(f"{type(error).__name__}: {error}")


class Connection(asyncio.Protocol):
    """Carries one request after the other. `is_reusable` says whether the next one may use it."""

    def __init__(self, unread: _Unread) -> None:
        self._unread = unread
        self._transport: asyncio.Transport | None = None
        self._parser: httptools.HttpResponseParser | None = None
        self._sink: ResponseSink | None = None
        self._headers: dict[str, str] = {}
        self._now_s = 0.0
        self._is_open = False
        self._keep_alive = False
        self.num_requests = 0
        self.got_bytes = False
        """Whether any byte of the current response has come."""

    @property
    def is_reusable(self) -> bool:
        return self._is_open and self._keep_alive and self._sink is None

    def send(self, request: bytes, sink: ResponseSink) -> None:
        """Write a whole request and deliver its response to `sink`."""
        assert self._sink is None, "one request at a time"
        self._sink = sink
        self._parser = httptools.HttpResponseParser(self)
        self.num_requests += 1
        self.got_bytes = False
        self._now_s = perf_counter()
        if self._transport is None or not self._is_open:
            self._finish("connection closed before the request was sent")
            return
        self._transport.write(request)

    def abort(self, problem: str) -> None:
        """End the response and the connection now."""
        self._now_s = perf_counter()
        self._finish(problem)
        if self._transport is not None:
            self._transport.abort()

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are no subclasses of this class, only alike.
        self._transport = cast(asyncio.Transport, transport)
        self._is_open = True
        self._keep_alive = True

    def data_received(self, data: bytes) -> None:
        self._unread.add(self, data)

    def connection_lost(self, exc: Exception | None) -> None:
        lost_s = perf_counter()
        self._unread.read()
        self._is_open = False
        self._now_s = lost_s
        reason = f"connection lost: {exc}" if exc else "connection closed by the server"
        self._finish(reason)

    def read(self, data: bytes, now_s: float) -> None:
        """Parse what came at `now_s`."""
        self._now_s = now_s
        self.got_bytes = True
        if self._parser is None:
            self.abort("the server sent bytes that no request asked for")
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserCallbackError as error:
            cause = error.__context__ or error
            self.abort(f"unreadable event: {cause}")
        except httptools.HttpParserError as error:
            self.abort(f"not a readable HTTP response: {error}")
        except httptools.HttpParserUpgrade:
            self.abort("the server wants to switch protocols")

    # httptools callbacks, all within read

    def on_header(self, name: bytes, value: bytes) -> None:
        key, text = name.decode("latin-1").lower(), value.decode("latin-1")
        self._headers[key] = f"{self._headers[key]}, {text}" if key in self._headers else text

    def on_headers_complete(self) -> None:
        assert self._parser is not None
        headers, self._headers = self._headers, {}
        if self._sink is not None:
            self._sink.on_headers(self._parser.get_status_code(), headers)

    def on_body(self, body: bytes) -> None:
        if self._sink is not None:
            self._sink.on_body(body, self._now_s)

    def on_message_complete(self) -> None:
        assert self._parser is not None
        if self._parser.get_status_code() < 200:
            return
        self._keep_alive = self._parser.should_keep_alive()
        self._finish(None)
        if not self._keep_alive and self._transport is not None:
            self._transport.close()

    def _finish(self, problem: str | None) -> None:
        sink, self._sink = self._sink, None
        self._parser = None
        if problem is not None:
            self._keep_alive = False
        if sink is not None:
            sink.on_end(problem, self._now_s)


@dataclass(slots=True)
class ConnectionPool:
    """Idle connections, the most recently used first, so that each user keeps finding its own."""

    origin: Origin
    connect_timeout_s: float = 10.0
    num_opened: int = 0
    _idle: list[Connection] = field(default_factory=list)
    _unread: _Unread | None = None
    _tls: ssl.SSLContext | None = field(init=False)

    def __post_init__(self) -> None:
        # Made once and early: it takes milliseconds, which no measured request should wait for.
        self._tls = ssl.create_default_context() if self.origin.is_tls else None

    def take_idle(self) -> Connection | None:
        while self._idle:
            connection = self._idle.pop()
            if connection.is_reusable:
                return connection
        return None

    async def open(self) -> Connection:
        """Make a new connection.

        Raises:
            OSError: it could not be made (`TimeoutError` and TLS errors are subclasses).
        """
        loop = asyncio.get_running_loop()
        unread = self._unread = self._unread or _Unread()
        async with asyncio.timeout(self.connect_timeout_s):
            _, connection = await loop.create_connection(
                lambda: Connection(unread), self.origin.host, self.origin.port, ssl=self._tls
            )
        self.num_opened += 1
        return connection

    def give_back(self, connection: Connection) -> None:
        if connection.is_reusable:
            self._idle.append(connection)

    def close(self) -> None:
        for connection in self._idle:
            with contextlib.suppress(RuntimeError):
                connection.abort("the pool was closed")
        self._idle.clear()
