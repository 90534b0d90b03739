"""Writes the output of one request as it comes, or as a whole, and notices when the client leaves.

The status line waits for the first token, so that a request that fails before it gets a proper status
instead of a stream that starts with an error. Steps that pass while the client reads slowly go into one
frame; a client that reads too slowly is cut off.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from services import errors
from services.core.outputs import ChoiceOutput, RequestState
from services.core.service import Service
from services.errors import ApiError
from services.http.scope import ABORT
from services.http.sse import Writer

_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]
_JSON_HEADER = (b"content-type", b"application/json")


class GenerationResponse(Response):
    """Releases the request at the end, whatever that is. `timeout_s` counts from the request's arrival."""

    def __init__(
        self, service: Service, request: RequestState, writer: Writer, *, streamed: bool, timeout_s: float
    ) -> None:
        super().__init__()
        self._service = service
        self._request = request
        self._writer = writer
        self._streamed = streamed
        self._timeout_s = timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = self._request
        loop = asyncio.get_running_loop()
        watch = loop.create_task(_watch(receive, request))
        left_s = request.arrival_s + self._timeout_s - time.monotonic()
        timer = loop.call_later(left_s, self._service.fail, request, errors.timed_out(self._timeout_s))
        try:
            await (self._stream(scope, send) if self._streamed else self._answer(send))
        finally:
            timer.cancel()
            watch.cancel()
            self._service.release(request)

    async def _answer(self, send: Send) -> None:
        request = self._request
        output = await request.whole_output()
        if request.error is not None:
            await _send_error(send, request.error, self._id_header())
        elif not request.is_disconnected:
            body = self._writer.whole(output)
            await _send_whole(send, 200, [_JSON_HEADER, *self._id_header()], body)

    async def _stream(self, scope: Scope, send: Send) -> None:
        abort = scope.get("extensions", {}).get(ABORT, {}).get("abort")
        stall_limit_s = self._service.settings.slow_reader_timeout_s
        stall = _StallTimer(self._request, stall_limit_s, abort) if abort else None
        try:
            await self._write_stream(send, stall)
        finally:
            if stall is not None:
                stall.stop()

    async def _write_stream(self, send: Send, stall: _StallTimer | None) -> None:
        request, writer = self._request, self._writer
        has_begun = False
        finished: dict[int, ChoiceOutput] = {}
        last_frame_s: float | None = None
        while True:
            output = await request.next_output()
            if request.is_disconnected:
                return
            frames = writer.frame(output) if output else b""
            if any(choice.token_ids for choice in output):
                now_s = time.monotonic()
                if last_frame_s is not None:
                    self._service.metrics.next_frame(now_s - last_frame_s)
                last_frame_s = now_s
            for choice in output:
                if choice.finish_reason is not None:
                    finished[choice.index] = choice
            is_last = request.error is not None or len(finished) == len(request.choices)
            if request.error is not None:
                if not has_begun:
                    await _send_error(send, request.error, self._id_header())
                    return
                frames += b"data: " + request.error.json_bytes + b"\n\n"
            elif is_last:
                frames += writer.end([finished[index] for index in sorted(finished)])
            if not has_begun:
                headers = [*_STREAM_HEADERS, *self._id_header()]
                await send({"type": "http.response.start", "status": 200, "headers": headers})
                has_begun = True
            if stall is not None:
                stall.begin()
            await send({"type": "http.response.body", "body": frames, "more_body": not is_last})
            if stall is not None:
                stall.end()
            if is_last:
                return

    def _id_header(self) -> list[tuple[bytes, bytes]]:
        return [(b"x-request-id", self._request.request_id.encode())]


class _StallTimer:
    """Cuts the client off when one write takes too long, or when too much waits behind it.

    One timer serves the whole stream: one for each frame would cost more than the frame.
    """

    def __init__(self, request: RequestState, limit_s: float, abort: Callable[[], Any]) -> None:
        self._request = request
        self._limit_s = limit_s
        self._abort = abort
        self._loop = asyncio.get_running_loop()
        self._began_s: float | None = None
        self._every_s = min(1.0, limit_s / 4) if limit_s else 1.0
        self._timer = self._loop.call_later(self._every_s, self._check)

    def begin(self) -> None:
        self._began_s = self._loop.time()

    def end(self) -> None:
        self._began_s = None

    def stop(self) -> None:
        self._timer.cancel()

    def _check(self) -> None:
        if self._began_s is not None:
            stalled_s = self._loop.time() - self._began_s
            if self._limit_s and stalled_s > self._limit_s:
                self._request.fail(errors.slow_reader(f"took nothing for {self._limit_s:g} s"))
            if self._request.error is not None and stalled_s > self._every_s:
                self._abort()
                return
        self._timer = self._loop.call_later(self._every_s, self._check)


async def _send_error(send: Send, error: ApiError, headers: list[tuple[bytes, bytes]]) -> None:
    """Answer with an error, where no status line was sent yet."""
    own = [(name.encode(), value.encode()) for name, value in error.headers.items()]
    await _send_whole(send, error.status, [_JSON_HEADER, *own, *headers], error.json_bytes)


async def _send_whole(send: Send, status: int, headers: list[tuple[bytes, bytes]], body: bytes) -> None:
    headers = [*headers, (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def _watch(receive: Receive, request: RequestState) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    request.disconnect()
