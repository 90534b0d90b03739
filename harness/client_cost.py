"""What the client itself costs: CPU per streamed token and per stream, and how late its stamps are.

`python -m harness.client_cost` runs a trivial server in a process of its own, streams from it with this
client and with httpx, and prints a table. The server writes the instant of sending where token ids
belong, so that each stamp can be held against it (one machine, one monotonic clock).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
from collections.abc import Awaitable, Callable, Iterable
from multiprocessing.connection import Connection
from time import perf_counter, process_time

import httpx
import numpy as np
from pydantic_core import from_json

from harness.answer import Answer
from harness.arrivals import PlannedRequest
from harness.client import StreamClient
from harness.connection import Origin
from harness.manifest import loop_factory
from harness.sse import EventSplitter
from harness.table import number, render_table
from harness.target import Target

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
GAP_S = 0.010

Delays = list[float]
Stream = Callable[[int, int], Awaitable[Delays]]


class _TrivialServer(asyncio.Protocol):
    """Answers any POST with `max_tokens` events, one every GAP_S."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self._buffer = b""

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        head, found, body = self._buffer.partition(b"\r\n\r\n")
        if not found:
            return
        length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0])
        if len(body) >= length:
            self._buffer = b""
            num_tokens = int(json.loads(body[:length])["max_tokens"])
            self._task = asyncio.get_running_loop().create_task(self._stream(num_tokens))

    async def _stream(self, num_tokens: int) -> None:
        self._write(HEAD)
        for position in range(num_tokens):
            await asyncio.sleep(GAP_S)
            is_last = position == num_tokens - 1
            ending = f'"length","num_prompt_tokens":1,"num_output_tokens":{num_tokens}' if is_last else "null"
            self._event(
                '{"id":"cmpl-0123456789abcdef","object":"text_completion","created":1700000000,"model":"none",'
                f'"choices":[{{"index":0,"text":" word","token_ids":[{int(perf_counter() * 1e6)}],'
                f'"finish_reason":{ending}}}]}}'
            )
        self._event("[DONE]")
        self._write(b"0\r\n\r\n")

    def _event(self, data: str) -> None:
        event = f"data: {data}\n\n".encode()
        self._write(f"{len(event):x}\r\n".encode() + event + b"\r\n")

    def _write(self, data: bytes) -> None:
        assert isinstance(self._transport, asyncio.WriteTransport)
        self._transport.write(data)


def _serve(ports: Connection) -> None:
    async def main() -> None:
        server = await asyncio.get_running_loop().create_server(_TrivialServer, "127.0.0.1", 0)
        ports.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(main())


def _own_client(port: int) -> Stream:
    client = StreamClient(Target(Origin("127.0.0.1", port), "/generate"))

    async def stream(num_streams: int, num_tokens: int) -> Delays:
        planned = PlannedRequest(0, "p", "a prompt", num_tokens, 0)
        answers = [Answer(planned, 0.0) for _ in range(num_streams)]
        await asyncio.gather(*(client.send([answer], 0) for answer in answers))
        failed = [answer.error for answer in answers if answer.error]
        if failed:
            raise RuntimeError(failed[0])
        return [d for answer in answers for d in _delays(answer.chunk_s, answer.token_ids)]

    return stream


def _httpx_client(port: int, *, by_lines: bool) -> Stream:
    """As commonly written (`aiter_lines`, `json`), or with the splitter and the parser of this client."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    client = httpx.AsyncClient(timeout=60.0, trust_env=False, limits=limits)
    url = f"http://127.0.0.1:{port}/generate"

    async def one(num_tokens: int) -> Delays:
        body = {"prompt": "a prompt", "max_tokens": num_tokens, "seed": 0, "stream": True}
        stamps: list[float] = []
        sent: list[int] = []
        async with client.stream("POST", url, json=body) as response:
            if by_lines:
                async for line in response.aiter_lines():
                    if line.startswith("data: {"):
                        stamps.append(perf_counter())
                        sent.append(json.loads(line[6:])["choices"][0]["token_ids"][0])
            else:
                splitter = EventSplitter()
                async for piece in response.aiter_raw():
                    now_s = perf_counter()
                    for data in splitter.feed(piece):
                        if data != b"[DONE]":
                            stamps.append(now_s)
                            sent.append(from_json(data)["choices"][0]["token_ids"][0])
        return _delays(stamps, sent)

    async def stream(num_streams: int, num_tokens: int) -> Delays:
        parts = await asyncio.gather(*(one(num_tokens) for _ in range(num_streams)))
        return [delay for part in parts for delay in part]

    return stream


def _delays(stamps: Iterable[float], sent_us: Iterable[int]) -> Delays:
    return [stamp - us * 1e-6 for stamp, us in zip(stamps, sent_us, strict=True)]


def _cost(make: Callable[[], Stream], uses_uvloop: bool, num_streams: int, num_tokens: int) -> list[str]:
    """CPU us per token and per stream (from a short and a long run), and the delay of the stamps in ms."""

    async def timed(stream: Stream, tokens: int) -> tuple[float, Delays]:
        before_s = process_time()
        delays = await stream(num_streams, tokens)
        return process_time() - before_s, delays

    async def run() -> tuple[float, float, Delays]:
        stream = make()
        await stream(num_streams, 2)  # opens the connections
        short_s, _ = await timed(stream, 1)
        long_s, delays = await timed(stream, 1 + num_tokens)
        return short_s, long_s, delays

    factory = loop_factory() if uses_uvloop else asyncio.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        short_s, long_s, delays = runner.run(run())
    per_token_us = (long_s - short_s) / (num_streams * num_tokens) * 1e6
    per_stream_us = short_s / num_streams * 1e6 - per_token_us
    p50_ms, p99_ms = np.percentile(np.asarray(delays) * 1e3, [50, 99])
    return [
        number(per_token_us),
        number(per_stream_us, 0),
        number(float(p50_ms), 2),
        number(float(p99_ms), 2),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="CPU cost of the streaming client, beside httpx")
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=200)
    args = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    server = context.Process(target=_serve, args=(theirs,), daemon=True)
    server.start()
    try:
        port = ours.recv()
        clients: list[tuple[str, Callable[[], Stream], bool]] = [
            ("this client, uvloop", lambda: _own_client(port), True),
            ("this client, asyncio", lambda: _own_client(port), False),
            ("httpx, raw bytes, uvloop", lambda: _httpx_client(port, by_lines=False), True),
            ("httpx, aiter_lines, uvloop", lambda: _httpx_client(port, by_lines=True), True),
            ("httpx, aiter_lines, asyncio", lambda: _httpx_client(port, by_lines=True), False),
        ]
        lines = [[name, *_cost(make, uvloop, args.streams, args.tokens)] for name, make, uvloop in clients]
    finally:
        server.terminate()
        server.join()
    print(f"{args.streams} streams at once, one event every {GAP_S * 1e3:g} ms each, {args.tokens} tokens")
    headers = [
        "client",
        "CPU us/token",
        "CPU us/stream",
        "stamp delay p50 (ms)",
        "p99 (ms)",
    ]
    print(render_table(headers, lines))


if __name__ == "__main__":
    main()
