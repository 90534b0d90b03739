"""Writes the answer of one request as it comes, or as a whole, and notices when the client leaves.

A `LiveRequest` enters; an HTTP response leaves through ASGI. The status line waits for the first token,
so that a request that fails before it gets a proper status instead of a stream that starts with an error.
Steps that pass while the client reads slowly go into one frame.
"""

from __future__ import annotations

import asyncio

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from services import refusals
from services.answers import LiveRequest
from services.contract import SamplingFields
from services.frames import DONE, Ending, FrameWriter
from services.refusals import Refusal
from services.service import Service

_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]
_JSON_HEADER = (b"content-type", b"application/json")


class LiveResponse(Response):
    """Releases the request when done, failed, cancelled or left."""

    def __init__(
        self, service: Service, live: LiveRequest, request: SamplingFields, writer: FrameWriter
    ) -> None:
        super().__init__()
        self._service = service
        self._live = live
        self._request = request
        self._writer = writer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        live, timeout_s = self._live, self._request.timeout_s
        loop = asyncio.get_running_loop()
        watch = loop.create_task(_watch(receive, live))
        timer = None
        if timeout_s is not None:
            refusal = refusals.timed_out(timeout_s)
            timer = loop.call_later(timeout_s, self._service.fail, live, refusal)
        try:
            await (self._stream(send) if self._request.stream else self._answer(send))
        finally:
            if timer is not None:
                timer.cancel()
            watch.cancel()
            self._service.release(live)

    async def _answer(self, send: Send) -> None:
        live = self._live
        answers = await live.whole()
        if live.failure is not None:
            await send_refusal(send, live.failure)
        elif not live.is_gone:
            body = self._writer.whole(answers)
            await _send_whole(send, 200, [_JSON_HEADER, *self._id_header()], body)

    async def _stream(self, send: Send) -> None:
        live, writer = self._live, self._writer
        is_begun = False
        endings: dict[int, Ending] = {}
        while True:
            news = await live.news()
            if live.is_gone:
                return
            frames = writer.frame(news) if news else b""
            for item in news:
                if item.ending is not None:
                    endings[item.index] = item.ending
            if live.failure is not None:
                if not is_begun:
                    await send_refusal(send, live.failure)
                    return
                frames += b"data: " + live.failure.json_bytes + b"\n\n"
            elif len(endings) == len(live.answers):
                options = self._request.stream_options
                if options is not None and options.include_usage:
                    frames += writer.usage_frame([endings[index] for index in sorted(endings)])
                frames += DONE
            if not is_begun:
                headers = [*_STREAM_HEADERS, *self._id_header()]
                await send({"type": "http.response.start", "status": 200, "headers": headers})
                is_begun = True
            is_last = live.failure is not None or len(endings) == len(live.answers)
            await send({"type": "http.response.body", "body": frames, "more_body": not is_last})
            if is_last:
                return

    def _id_header(self) -> list[tuple[bytes, bytes]]:
        return [(b"x-request-id", self._live.request_id.encode())]


async def send_refusal(send: Send, refusal: Refusal) -> None:
    """Answer with an error, where no status line was sent yet."""
    headers = [(name.encode(), value.encode()) for name, value in refusal.headers.items()]
    await _send_whole(send, refusal.status, [_JSON_HEADER, *headers], refusal.json_bytes)


async def _send_whole(send: Send, status: int, headers: list[tuple[bytes, bytes]], body: bytes) -> None:
    headers = [*headers, (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def _watch(receive: Receive, live: LiveRequest) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    live.leave()
