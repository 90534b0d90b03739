"""The hot loop: sends prompts and turns the streamed answer into stamped chunks.

The instant of a chunk is that of its bytes, which `harness.client.connection` stamps. One request may carry
several prompts, whose choices are told apart by index. A failure, a timeout or an early
end becomes the `error` of each unfinished answer; nothing is raised for it.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Sequence
from time import perf_counter
from typing import Any

from pydantic_core import from_json

from harness.client.answer import Answer, as_text, fail_all
from harness.client.connection import Connection, ConnectionPool
from harness.client.server_words import MAX_WORDS, error_in, error_in_text
from harness.client.sse import EventSplitter
from harness.client.target import Target

MAX_ERROR_BODY_BYTES = 64 * 1024


class StreamClient:
    """Sends streaming requests to one target over kept-alive connections."""

    def __init__(self, target: Target, *, timeout_s: float = 600.0, connect_timeout_s: float = 10.0) -> None:
        self._target = target
        self._timeout_s = timeout_s
        self.pool = ConnectionPool(target.origin, connect_timeout_s)
        self._active: set[_Exchange] = set()
        self._closed_because: str | None = None

    async def send(self, answers: Sequence[Answer], group_id: int) -> None:
        """Send one request for all of `answers` and see it through. Never raises for a failed request."""
        body = self._target.body([answer.planned for answer in answers])
        digest = hashlib.sha256(body).hexdigest()
        request = self._target.request(body, is_chat=answers[0].planned.is_chat)
        exchange = _Exchange(answers)
        self._active.add(exchange)
        sent_s = perf_counter()
        for answer in answers:
            answer.group_id, answer.group_size = group_id, len(answers)
            answer.body_sha256, answer.sent_s = digest, sent_s
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._exchange(request, exchange)
        except TimeoutError:
            exchange.abort(f"timeout: no complete answer within {self._timeout_s:g} s")
        except asyncio.CancelledError:
            exchange.abort(self._closed_because or "cancelled by the harness")
            raise
        finally:
            self._active.discard(exchange)

    def abort_all(self, reason: str) -> None:
        """End every request in flight; its unfinished answers fail with `reason`."""
        self._closed_because = reason
        for exchange in tuple(self._active):
            exchange.abort(reason)

    def close(self) -> None:
        self.abort_all("the client was closed")
        self.pool.close()

    async def _exchange(self, request: bytes, exchange: _Exchange) -> None:
        connection = self.pool.take_idle()
        while True:
            if connection is None:
                try:
                    connection = await self.pool.open()
                except TimeoutError:
                    exchange.abort(f"connect: no connection within {self.pool.connect_timeout_s:g} s")
                    return
                except OSError as error:
                    exchange.abort(f"connect: {error}")
                    return
            if self._closed_because is not None:
                connection.abort(self._closed_because)
                exchange.abort(self._closed_because)
                return
            await exchange.run(connection, request)
            # A server may close an idle connection just as it is used again: nothing of the answer
            # came, so the request goes out once more on a fresh one, within the same `sent_s`.
            if exchange.lost_before_answer:
                exchange.lost_before_answer = False
                connection = None
                continue
            self.pool.give_back(connection)
            return


class _Exchange:
    """One request and its response; the sink of the connection that carries it."""

    def __init__(self, answers: Sequence[Answer]) -> None:
        self._answers = answers
        self._connection: Connection | None = None
        self._ended: asyncio.Future[None] | None = None
        self._splitter = EventSplitter()
        self._status = 0
        self._is_stream = False
        self._content_type = ""
        self._other_body = bytearray()
        self._problem: str | None = None
        self.lost_before_answer = False

    async def run(self, connection: Connection, request: bytes) -> None:
        self._connection = connection
        self._ended = asyncio.get_running_loop().create_future()
        written_s = perf_counter()
        for answer in self._answers:
            answer.written_s = written_s
        connection.send(request, self)
        await self._ended

    def abort(self, reason: str) -> None:
        if self._connection is not None and self._ended is not None and not self._ended.done():
            self._problem = reason
            self._connection.abort(reason)
        fail_all(self._answers, reason, perf_counter())

    # ResponseSink

    def on_headers(self, status: int, headers: dict[str, str]) -> None:
        if status < 200:
            return
        self._status = status
        self._content_type = headers.get("content-type", "")
        self._is_stream = status == 200 and _is_event_stream(self._content_type)

    def on_body(self, piece: bytes, now_s: float) -> None:
        if not self._is_stream:
            if len(self._other_body) < MAX_ERROR_BODY_BYTES:
                self._other_body += piece
            return
        for data in self._splitter.feed(piece):
            if data.strip() == b"[DONE]":
                self._close(now_s, self._beside_events())
            else:
                self._on_event(_decode(data), now_s)

    def on_end(self, problem: str | None, now_s: float) -> None:
        assert self._connection is not None
        if problem is not None and not self._connection.got_bytes and self._problem is None:
            self.lost_before_answer = self._connection.num_requests > 1
        if not self.lost_before_answer:
            # A body without a length ends with its connection, which is no problem of its own.
            self._close(now_s, self._problem or self._unstreamed() or self._beside_events() or problem)
        if self._ended is not None and not self._ended.done():
            self._ended.set_result(None)

    def _on_event(self, event: Any, now_s: float) -> None:
        if not isinstance(event, dict):
            raise ValueError(f"an event is {type(event).__name__}, not an object")
        if error := error_in(event):
            self._close(now_s, f"in mid-stream: {error}")
            return
        for choice in event.get("choices") or ():
            index = choice.get("index") or 0
            if not 0 <= index < len(self._answers):
                raise ValueError(f"a choice has index {index}, the request {len(self._answers)} prompts")
            answer = self._answers[index]
            if answer.server_request_id is None and event.get("id") is not None:
                answer.server_request_id = as_text(event["id"])
            answer.add(choice, now_s)
        usage = event.get("usage")
        if usage and len(self._answers) == 1:
            self._answers[0].add_usage(usage)

    def _close(self, now_s: float, problem: str | None) -> None:
        for answer in self._answers:
            answer.close(now_s, problem)

    def _unstreamed(self) -> str | None:
        """Why a response is no answer; None for a stream, which speaks for itself, and where none came."""
        if self._is_stream or not self._status:
            return None
        text = bytes(self._other_body).decode("utf-8", "replace").strip()
        error = error_in_text(text)
        if self._status == 200:
            kind = self._content_type or "without a content type"
            problem = f"the server answered {kind}, not an event stream"
            return f"{problem}: {error}" if error else problem
        text = error or text[:MAX_WORDS]
        return f"http {self._status}: {text}" if text else f"http {self._status}"

    def _beside_events(self) -> str | None:
        """An error that the server wrote into its stream, but not as an event."""
        error = error_in_text(self._splitter.stray_text()) if self._is_stream else None
        return f"in mid-stream: {error}" if error else None


def _is_event_stream(content_type: str) -> bool:
    """By RFC 9110: names in any case, parameters behind them, several in a list."""
    kinds = (item.partition(";")[0].strip().lower() for item in content_type.split(","))
    return "text/event-stream" in kinds


def _decode(data: bytes) -> Any:
    """JSON as servers write it: some cut a character's two surrogates into two events."""
    try:
        return from_json(data)
    except ValueError:
        return json.loads(data)
