"""One client's connection, and what it may cost before anybody knows who sends.

The API key is looked at when the head of a request (its request line and headers) is there. Until then a
client may send `MAX_HEAD_BYTES` and take `HEAD_TIMEOUT_S`. As many bytes may stand between two pieces of a
chunked body, and behind it: the parser gathers trailers as it gathers headers. At the limit of connections a
new one takes the place of the one that has been without a request for longest. Where all have one, /health
is still answered.
"""

from __future__ import annotations

import asyncio
import logging
import re
import resource
from asyncio import TimerHandle, Transport
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn._types import ASGI3Application
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, RequestResponseCycle

from adapters.base import ConfigError
from services import errors
from services.errors import ApiError
from services.http.half_close import HalfCloseProtocol
from services.http.scope import ABORT

MAX_HEAD_BYTES = 65_536
MAX_HEADERS = 256
MAX_PIPELINED = 4
"""Requests of one connection that wait for the answer of the one before."""
HEAD_TIMEOUT_S = 30.0
LINGER_S = 1.0
"""How long a refused client may go on sending. A connection that is closed at once loses its last answer."""
MOST_CONNECTIONS = 8192
KEPT_FOR_HEALTH = 32
_KEPT_FOR_OURSELVES = 96
"""Descriptors: logs, the event loop's own, the pipes of two engines while one is replaced."""
_HEALTH = "/health"
_UPGRADE = re.compile(rb"(?<=\r\n)upgrade(?=[ \t]*:)", re.IGNORECASE)

logger = logging.getLogger("lab.access")


def max_connections(wanted: int | None) -> int:
    """How many connections may be open: `wanted`, or what the system's limit of descriptors leaves.

    Raises:
        ConfigError: the limit leaves fewer than `wanted`.
    """
    num_descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if num_descriptors == resource.RLIM_INFINITY:
        return wanted or MOST_CONNECTIONS
    left = num_descriptors - KEPT_FOR_HEALTH - _KEPT_FOR_OURSELVES
    if left < (wanted or 1):
        least = (wanted or 1) + KEPT_FOR_HEALTH + _KEPT_FOR_OURSELVES
        raise ConfigError(
            f"this process may open {num_descriptors} files, {max(left, 0)} of them connections: raise the "
            f"limit (ulimit -n) to {least} or lower MAX_CONNECTIONS"
        )
    return wanted or min(left, MOST_CONNECTIONS)


class ConnectionLimit:
    """The open connections of one server, and the requests that wait to be begun.

    One request is begun a turn of the loop: behind a crowd that sends at once, /health and the tokens of
    streams would wait for all of it.

    `on_refused` hears the code of each refusal that no route sees.
    """

    def __init__(self, limit: int, on_refused: Callable[[str], None] = lambda code: None) -> None:
        self.limit = limit
        self.on_refused = on_refused
        self.idle: dict[Connection, None] = {}
        """Those that have no request now, longest without one first."""
        self._starts: deque[Callable[[], None]] = deque()

    def start(self, start: Callable[[], None], loop: asyncio.AbstractEventLoop) -> None:
        """Call `start` when its turn has come."""
        self._starts.append(start)
        if len(self._starts) == 1:
            loop.call_soon(self._start_next, loop)

    def _start_next(self, loop: asyncio.AbstractEventLoop) -> None:
        self._starts.popleft()()
        if self._starts:
            loop.call_soon(self._start_next, loop)


class Connection(HalfCloseProtocol):
    """Gives each request a way to drop its connection, unsent bytes and all (`ABORT`)."""

    def __init__(self, *args: Any, limit: ConnectionLimit, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._limit = limit
        self._error: ApiError | None = None
        """Why the rest of what comes is thrown away."""
        self._timer: TimerHandle | None = None
        self._is_in_head = False
        self._num_head_bytes = 0
        self._num_framing_bytes = 0
        """Of the present message: what came, its body left out."""
        self._num_body_bytes = 0

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        num_over = len(self.connections) - self._limit.limit
        if num_over > 0:
            if self._limit.idle:
                next(iter(self._limit.idle))._drop()
            elif num_over > KEPT_FOR_HEALTH:
                self._drop()
                return
            else:
                self.app = _only_health(self.app, self._limit.on_refused)
        self._wait_for_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        self._limit.idle.pop(self, None)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._error is not None:
            return
        if self._timer is None and self in self._limit.idle:
            self._wait_for_head()
        if self._is_in_head or self.cycle is None or not self.cycle.more_body:
            data = _without_upgrade(data)
        # Where a head or a piece of a body begins in `data`, parsing starts the count anew.
        self._num_head_bytes += len(data)
        self._num_framing_bytes += len(data)
        super().data_received(data)
        if self._num_head_bytes > MAX_HEAD_BYTES and self._error is None:
            self._refuse(errors.head_too_large(MAX_HEAD_BYTES, MAX_HEADERS))
        # Each piece of a body is a call of the parser: tiny ones without end would hold the loop.
        if self._num_framing_bytes > 2 * MAX_HEAD_BYTES + 8 * self._num_body_bytes and self._error is None:
            self._refuse(errors.framing_too_large())

    def on_message_begin(self) -> None:
        self._is_in_head = True
        self._num_head_bytes = self._num_framing_bytes = self._num_body_bytes = 0
        super().on_message_begin()
        hold: dict[Any, Any] = {"abort": self.transport.abort, "is_closing": self.transport.is_closing}
        self.scope["extensions"] = {ABORT: hold}

    def on_header(self, name: bytes, value: bytes) -> None:
        if len(self.headers) >= MAX_HEADERS:
            self._fail(errors.head_too_large(MAX_HEAD_BYTES, MAX_HEADERS))
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        num_bytes = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        if num_bytes > MAX_HEAD_BYTES:  # it came in one piece
            self._fail(errors.head_too_large(MAX_HEAD_BYTES, MAX_HEADERS))
        if len(self.pipeline) >= MAX_PIPELINED:
            self._fail(errors.too_many_pipelined(MAX_PIPELINED))
        self._is_in_head = False
        self._stop_timer()
        self._limit.idle.pop(self, None)
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._num_head_bytes = 0
        self._num_body_bytes += len(body)
        self._num_framing_bytes -= len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self.cycle.response_complete:  # the rest of a body that nobody wanted has come
            self._stop_timer()
        super().on_message_complete()

    def on_response_complete(self) -> None:
        is_last = not self.pipeline
        super().on_response_complete()
        if is_last and not self.transport.is_closing():
            self._limit.idle[self] = None
            if self.cycle.more_body:
                self._stop_timer()
                self._timer = self.loop.call_later(LINGER_S, self._drop)

    def send_400_response(self, msg: str) -> None:
        """What uvicorn calls where parsing fails, our own checks within it included."""
        self._refuse(self._error or errors.not_http())

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self.running = cycle
        if cycle.scope["path"] == _HEALTH:
            super()._start_asgi_task(cycle, app)
        else:
            self._limit.start(partial(self._start_late, cycle, app), self.loop)

    def _start_late(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        if not cycle.disconnected:  # who left meanwhile costs nothing more
            super()._start_asgi_task(cycle, app)

    def _wait_for_head(self) -> None:
        self._limit.idle[self] = None
        self._timer = self.loop.call_later(HEAD_TIMEOUT_S, self._head_is_late)

    def _head_is_late(self) -> None:
        if self._is_in_head:
            self._refuse(errors.head_too_slow(HEAD_TIMEOUT_S))
        else:
            self._drop()

    def _fail(self, error: ApiError) -> None:
        """Leave the parser with an error."""
        self._error = error
        raise error

    def _refuse(self, error: ApiError) -> None:
        """Answer with an error and close, in place of a request that waits for its answer; one that is being
        written ends without its end."""
        self._error = error
        self._limit.on_refused(error.code)
        self._stop_timer()
        self.abandon()
        running = self.running
        if running is not None and running.response_started and not running.response_complete:
            self._drop()
            return
        fields = {"status": error.status, "code": error.code}
        logger.info("refused before it was a request", extra={"fields": fields})
        head = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n"
        body = error.json_bytes
        self.transport.write(STATUS_LINE[error.status] + head % len(body) + body)
        self.transport.write_eof()
        self._timer = self.loop.call_later(LINGER_S, self._drop)

    def _drop(self) -> None:
        self._limit.idle.pop(self, None)
        self.transport.abort()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def _without_upgrade(data: bytes) -> bytes:
    """Rename the header that asks for another protocol. None is spoken here, and where one is asked for the
    parser passes over the body. Java's client asks for HTTP/2 in this way."""
    head, blank, rest = data.partition(b"\r\n\r\n")
    return _UPGRADE.sub(b"x-upgrade", head) + blank + rest


def _only_health(app: ASGIApp, on_refused: Callable[[str], None]) -> ASGIApp:
    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] == _HEALTH:
            await app(scope, receive, send)
            return
        error = errors.too_many_connections()
        on_refused(error.code)
        headers = {"content-type": "application/json", "connection": "close", **error.headers}
        await Response(error.json_bytes, error.status, headers)(scope, receive, send)

    return answer
