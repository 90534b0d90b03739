"""A server whose every delay is known: what the harness itself is measured with.

Each token id is the instant of its sending, in whole microseconds of the machine's monotonic clock, and the
finishing entry carries receipt and first write. So the client's stamps can be held against the truth. No
model, no batching.
"""

from __future__ import annotations

import asyncio
import gc
import json
import multiprocessing
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from time import perf_counter

from harness.replay.event_loop import loop_factory
from harness.replay.parent import end_with_parent

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


@dataclass(frozen=True, slots=True)
class Delays:
    """Before the first token and between two; `is_random` draws exponentials of these means.

    `busy_s`: the server works on one request at a time, so long on each, in the order of their coming; its
    knee is 1 / `busy_s` requests a second.

    `stall_after_s`, `stall_s`: once, so long after its first request, the whole server stands still.
    """

    ttft_s: float = 0.0
    gap_s: float = 0.0
    is_random: bool = False
    busy_s: float = 0.0
    stall_after_s: float | None = None
    stall_s: float = 0.0


class _Turns:
    """When the one worker of the server is free again, by the clock and not by its sleeps."""

    def __init__(self, busy_s: float) -> None:
        self._busy_s = busy_s
        self._free_s = 0.0

    async def take(self, received_s: float) -> None:
        self._free_s = max(self._free_s, received_s) + self._busy_s
        await asyncio.sleep(self._free_s - perf_counter())


class _Connection(asyncio.Protocol):
    def __init__(self, delays: Delays, draw: random.Random, turns: _Turns) -> None:
        self._delays = delays
        self._turns = turns
        self._draw = draw
        self._buffer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        received_s = perf_counter()
        self._buffer += data
        head, found, body = self._buffer.partition(b"\r\n\r\n")
        if not found:
            return
        if not head.startswith(b"POST"):
            self._write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
            self._buffer = b""
            return
        length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0])
        if len(body) >= length:
            self._buffer = b""
            num_tokens = int(json.loads(body[:length])["max_tokens"])
            self._task = asyncio.get_running_loop().create_task(self._stream(num_tokens, received_s))

    async def _stream(self, num_tokens: int, received_s: float) -> None:
        first_s = 0.0
        if self._delays.busy_s:
            await self._turns.take(received_s)
        for position in range(num_tokens):
            mean_s = self._delays.gap_s if position else self._delays.ttft_s
            if mean_s:
                await asyncio.sleep(self._draw.expovariate(1 / mean_s) if self._delays.is_random else mean_s)
            now_s = perf_counter()
            ending = "null"
            if not position:
                first_s = now_s
            if position == num_tokens - 1:
                ending = (
                    f'"length","num_prompt_tokens":1,"num_output_tokens":{num_tokens},'
                    f'"timings":{{"received_s":{received_s!r},"first_write_s":{first_s!r}}}'
                )
            event = _event(
                '{"id":"cmpl-0123456789abcdef","object":"text_completion","created":1700000000,"model":"none",'
                f'"choices":[{{"index":0,"text":" word","token_ids":[{int(now_s * 1e6)}],'
                f'"finish_reason":{ending}}}]}}'
            )
            self._write(event if position else HEAD + event)
        self._write(_event("[DONE]") + b"0\r\n\r\n")

    def _write(self, data: bytes) -> None:
        # uvloop's transports are no subclasses of this class, only alike.
        self._transport.write(data)  # type: ignore[attr-defined]


def _event(data: str) -> bytes:
    event = f"data: {data}\n\n".encode()
    return f"{len(event):x}\r\n".encode() + event + b"\r\n"


def _serve(pipe: Connection, delays: Delays) -> None:
    end_with_parent()
    gc.disable()  # a collection would be a delay that it was not told

    async def main() -> None:
        loop = asyncio.get_running_loop()
        draw, turns = random.Random(1), _Turns(delays.busy_s)
        is_started = False

        def connect() -> _Connection:
            nonlocal is_started
            if delays.stall_after_s is not None and not is_started:
                loop.call_later(delays.stall_after_s, time.sleep, delays.stall_s)
            is_started = True
            return _Connection(delays, draw, turns)

        server = await loop.create_server(connect, "127.0.0.1", 0, backlog=4096)
        pipe.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        runner.run(main())


@contextmanager
def known_server(delays: Delays) -> Iterator[int]:
    """The port of a server in a process of its own, which ends with the block."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, delays), daemon=True)
    process.start()
    try:
        yield int(ours.recv())
    finally:
        process.terminate()
        process.join()
