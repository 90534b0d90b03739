"""What the client itself costs: CPU per streamed token and per stream, and how late its stamps are.

`python -m harness.selfcheck.client_cost` prints a table of this client beside httpx, both against a
`known_server` in a process of its own.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Awaitable, Callable, Iterable
from time import perf_counter, process_time

import httpx
import numpy as np
from pydantic_core import from_json

from harness.client.answer import Answer
from harness.client.connection import Origin
from harness.client.sse import EventSplitter
from harness.client.stream import StreamClient
from harness.client.target import Target
from harness.plan.schedule import PlannedRequest
from harness.replay.event_loop import loop_factory
from harness.replay.known_server import Delays, known_server
from harness.results.table import number, render_table

GAP_S = 0.010

Late = list[float]
Stream = Callable[[int, int], Awaitable[Late]]


def _own_client(port: int) -> Stream:
    client = StreamClient(Target(Origin("127.0.0.1", port), "/generate"))

    async def stream(num_streams: int, num_tokens: int) -> Late:
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

    async def one(num_tokens: int) -> Late:
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

    async def stream(num_streams: int, num_tokens: int) -> Late:
        parts = await asyncio.gather(*(one(num_tokens) for _ in range(num_streams)))
        return [delay for part in parts for delay in part]

    return stream


def _delays(stamps: Iterable[float], sent_us: Iterable[int]) -> Late:
    return [stamp - us * 1e-6 for stamp, us in zip(stamps, sent_us, strict=True)]


def _cost(make: Callable[[], Stream], uses_uvloop: bool, num_streams: int, num_tokens: int) -> list[str]:
    """CPU us per token and per stream (from a short and a long run), and the delay of the stamps in ms."""

    async def timed(stream: Stream, tokens: int) -> tuple[float, Late]:
        before_s = process_time()
        delays = await stream(num_streams, tokens)
        return process_time() - before_s, delays

    async def run() -> tuple[float, float, Late]:
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
    with known_server(Delays(GAP_S, GAP_S)) as port:
        clients: list[tuple[str, Callable[[], Stream], bool]] = [
            ("this client, uvloop", lambda: _own_client(port), True),
            ("this client, asyncio", lambda: _own_client(port), False),
            ("httpx, raw bytes, uvloop", lambda: _httpx_client(port, by_lines=False), True),
            ("httpx, aiter_lines, uvloop", lambda: _httpx_client(port, by_lines=True), True),
            ("httpx, aiter_lines, asyncio", lambda: _httpx_client(port, by_lines=True), False),
        ]
        lines = [[name, *_cost(make, uvloop, args.streams, args.tokens)] for name, make, uvloop in clients]
    print(f"{args.streams} streams at once, one event every {GAP_S * 1e3:g} ms each, {args.tokens} tokens")
    headers = ["client", "CPU us/token", "CPU us/stream", "stamp delay p50 (ms)", "p99 (ms)"]
    print(render_table(headers, lines))


if __name__ == "__main__":
    main()
