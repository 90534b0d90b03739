"""A server on a loopback socket that answers as a test tells it to: whole, slowly, wrongly or not at all."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\nTransfer-Encoding: chunked\r\n\r\n"
)
END = b"0\r\n\r\n"


class HangUp(Exception):
    """Raised by an answer to close the connection where it stands."""


Answering = Callable[[dict[str, Any]], AsyncIterator[bytes]]


def chunk(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


def event(payload: dict[str, Any] | str) -> bytes:
    text = payload if isinstance(payload, str) else json.dumps(payload)
    return chunk(f"data: {text}\n\n".encode())


def entry(
    index: int, token_ids: list[int] | None, finish: int | None = None, text: str = " w"
) -> dict[str, Any]:
    """One entry of `choices`; `finish` is the number of output tokens of its finishing entry."""
    choice: dict[str, Any] = {"index": index, "text": text, "finish_reason": None}
    if token_ids is not None:
        choice["token_ids"] = token_ids
    if finish is not None:
        timings = {
            "queue_s": 0.5, "batch_wait_s": 0.25, "prefill_s": 0.125, "decode_s": 1.0,
            "num_steps": finish, "mean_batch_size": 2.5,
        }  # fmt: skip
        choice |= {"finish_reason": "length", "timings": timings}
        choice |= {"num_prompt_tokens": 7, "num_output_tokens": finish}
    return choice


def as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def lab_tokens(prompt: str, seed: int, num: int) -> list[int]:
    """What a well-behaved fake service generates: a function of prompt and seed alone."""
    return [(len(prompt) * 31 + seed + i) % 4096 for i in range(num)]


async def answer_all(body: dict[str, Any], step_s: float = 0.0) -> AsyncIterator[bytes]:
    """All prompts of a request, one token each in a common event, as our service streams."""
    prompts, budgets, seeds = (as_list(body[name]) for name in ("prompt", "max_tokens", "seed"))
    tokens = [lab_tokens(*item) for item in zip(prompts, seeds, budgets, strict=True)]
    yield STREAM_HEAD
    for position in range(max(budgets)):
        await asyncio.sleep(step_s)
        choices = [
            entry(i, [ids[position]], len(ids) if position == len(ids) - 1 else None)
            for i, ids in enumerate(tokens)
            if position < len(ids)
        ]
        yield event({"id": "cmpl-1", "choices": choices})
    yield event("[DONE]")
    yield END


async def wait_until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 - what is waited for happens on another thread
        await asyncio.sleep(0.002)


def slowly(step_s: float) -> Answering:
    return lambda body: answer_all(body, step_s)


@dataclass
class FakeServer:
    """Serves on a thread of its own while entered. `bodies` are the requests as they came, in order."""

    answer: Answering = answer_all
    card: dict[str, Any] | None = None
    metrics: Callable[[], str] | None = None
    """What `/metrics` says when it is asked."""
    pages: dict[str, Any] = field(default_factory=dict)
    """What other paths say: JSON, text, or None for no such page."""
    hang: tuple[str, ...] = ()
    """Paths that never answer."""
    asked: list[str] = field(default_factory=list)
    """Paths of all GETs, in order."""
    bodies: list[bytes] = field(default_factory=list)
    heads: list[str] = field(default_factory=list)
    num_connections: int = 0
    port: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        self._loop = asyncio.new_event_loop()
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        assert self._started.wait(5)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(5)
        self._loop.close()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._main())

    async def _main(self) -> None:
        self._stop = asyncio.Event()
        server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        self._started.set()
        await self._stop.wait()
        server.close()
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()
        await asyncio.sleep(0)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        with contextlib.suppress(
            HangUp, ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError
        ):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                length = int(head.lower().partition("content-length:")[2].split("\r\n")[0] or 0)
                body = await reader.readexactly(length)
                await self._respond(head, body, writer)
        writer.close()

    async def _respond(self, head: str, body: bytes, writer: asyncio.StreamWriter) -> None:
        method, path = head.split(" ")[:2]
        if method == "GET":
            if path in self.hang:
                await asyncio.sleep(60)
            writer.write(self._page(path))
            return
        self.heads.append(head)
        self.bodies.append(body)
        async for data in self.answer(json.loads(body)):
            writer.write(data)
            await writer.drain()

    def _page(self, path: str) -> bytes:
        self.asked.append(path)
        if path == "/metrics" and self.metrics is not None:
            return text_response(self.metrics())
        pages: dict[str, Any] = {"/v1/models": {"data": [{"id": "foreign-model"}]}}
        if self.card is not None:
            pages["/model"] = self.card
            pages["/steps"] = {"steps": [], "next": 0, "num_dropped": 0}
        pages |= self.pages
        page = pages.get(path.partition("?")[0])
        if isinstance(page, str):
            return text_response(page)
        return json_response(404, {"detail": "no such page"}) if page is None else json_response(200, page)


def text_response(text: str) -> bytes:
    content = text.encode()
    head = f"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: {len(content)}\r\n\r\n"
    return head.encode() + content


def json_response(status: int, payload: dict[str, Any]) -> bytes:
    content = json.dumps(payload).encode()
    head = f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    return head.encode() + content


def model_card(**changes: Any) -> dict[str, Any]:
    """A `/model` page of a service of ours."""
    card: dict[str, Any] = {
        "model": "fake-model", "backend": "null", "variant": "continuous", "device": "none", "dtype": "none",
        "vocab_size": 4096, "eos_token_ids": [0], "max_batch_size": 16, "max_model_len": 4096,
        "kv_capacity_tokens": 65536, "num_parameters": 0, "model_digest": "d1", "scheduling": "lab",
        "num_threads": 1, "details": {}, "strategy": {"max_batch": 16}, "client_chunk": 1, "max_queue": 256,
        "settings": {}, "version": "0",
    }  # fmt: skip
    return card | changes
