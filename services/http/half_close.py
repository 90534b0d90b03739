"""HTTP on a socket of which the client has shut its sending side, and HTTP/1.0.

A client that has left and one that only has no more to say look the same: both sent an end. Who has left
answers what is written to it with a reset, so a stream finds out by its tokens. Where no answer has begun,
`100 Continue` is written now and then, which any client passes over.
"""

from __future__ import annotations

import asyncio

from uvicorn._types import ASGI3Application, ASGIReceiveCallable, ASGISendCallable, ASGISendEvent, Scope
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

PROBES_AFTER_S = (0.03, 0.02, 0.5, 0.02)
"""In pairs, the last two again and again: one write brings the reset, the next one meets it."""
_INTERIM = b"HTTP/1.1 100 Continue\r\n\r\n"


class HalfCloseProtocol(HttpToolsProtocol):
    running: RequestResponseCycle | None = None
    """The request that is being answered, or was last; `cycle` is the last one that came."""
    _probe: asyncio.TimerHandle | None = None
    _num_probes = 0

    def eof_received(self) -> bool:  # type: ignore[override]
        """Returns whether the connection stays: a whole request still has to be answered."""
        last = self.pipeline[0][0] if self.pipeline else self.cycle
        if last is None or last.response_complete or last.more_body:
            return False
        last.keep_alive = False
        self._probe_soon()
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        if self._probe is not None:
            self._probe.cancel()
        self.abandon()  # uvicorn tells the request that came last, behind which this one may be pipelined
        super().connection_lost(exc)

    def abandon(self) -> None:
        """Tell the request that is being answered that nobody reads; what it still sends goes nowhere."""
        if self.running is not None and not self.running.response_complete:
            self.running.disconnected = True
            self.running.message_event.set()

    def _probe_soon(self) -> None:
        at = self._num_probes
        self._num_probes += 1
        self._probe = self.loop.call_later(PROBES_AFTER_S[at if at < 4 else 2 + at % 2], self._ask)

    def _ask(self) -> None:
        if self.transport.is_closing():
            return
        cycle = self.running
        if cycle is not None and not cycle.response_started and cycle.scope["http_version"] == "1.1":
            self.transport.write(_INTERIM)
        self._probe_soon()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        if cycle.scope["http_version"] == "1.0":
            app = _Unframed(cycle, app)
        self.running = cycle
        super()._start_asgi_task(cycle, app)


class _Unframed:
    """HTTP/1.0 knows no chunks: a body of unknown length ends with the connection."""

    def __init__(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self._cycle = cycle
        self._app = app

    async def __call__(self, scope: Scope, receive: ASGIReceiveCallable, send: ASGISendCallable) -> None:
        cycle, has_length = self._cycle, True

        async def send_unframed(message: ASGISendEvent) -> None:
            nonlocal has_length
            if message["type"] == "http.response.start":
                has_length = any(name.lower() == b"content-length" for name, _ in message["headers"])
                if not has_length:
                    cycle.chunked_encoding = False
            elif message["type"] == "http.response.body" and not has_length:
                cycle.expected_content_length = len(message["body"])  # of this piece
            await send(message)

        await self._app(scope, receive, send_unframed)
