"""A service on a loopback port for tests, over real sockets, and readers for what it sends."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import httpx
import uvicorn

from services.core.service import Service
from services.engine_client.client import MakeClient
from services.http.app import create_app
from services.http.connection import Connection, ConnectionLimit
from services.main import listen_on
from services.read_settings import read_settings

DEADLINE_S = 20.0
CLIENT = httpx.Client(timeout=DEADLINE_S, verify=False)  # making one costs more than most tests


@dataclass
class Served:
    """A running service, its address, and the loop that it runs on."""

    service: Service
    url: str
    port: int
    loop: asyncio.AbstractEventLoop

    def call(self, work: Callable[[], Any]) -> Any:
        """Run `work` on the service's own thread."""

        async def run() -> Any:
            return work()

        return asyncio.run_coroutine_threadsafe(run(), self.loop).result(DEADLINE_S)

    def post(self, path: str = "/generate", **fields: Any) -> httpx.Response:
        return CLIENT.post(self.url + path, json=fields)

    def get(self, path: str) -> httpx.Response:
        return CLIENT.get(self.url + path)


@contextlib.contextmanager
def serving(
    make_client: MakeClient | None = None,
    *,
    load: bool = True,
    deadline_s: float = DEADLINE_S,
    **settings: Any,
) -> Iterator[Served]:
    """The null backend in a thread of this process; with `load` false it stays in "starting"."""
    names = {"BACKEND": "null", "ENGINE_PROCESS": False, **settings}
    service = Service(read_settings(names, env_file=None), make_client)
    limit = ConnectionLimit(service.settings.max_connections or 1000, service.metrics.request_rejected)
    config = uvicorn.Config(
        create_app(service),
        http=cast(type[Connection], partial(Connection, limit=limit)),
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="warning",
    )
    server = uvicorn.Server(config)
    listener = listen_on("127.0.0.1", 0)
    port = listener.getsockname()[1]
    loop = asyncio.new_event_loop()

    async def live() -> None:
        if load:
            await service.start()
        await server.serve(sockets=[listener])
        await service.close()

    thread = threading.Thread(target=loop.run_until_complete, args=(live(),))
    thread.start()
    try:
        until(lambda: server.started, deadline_s)
        yield Served(service, f"http://127.0.0.1:{port}", port, loop)
    finally:
        server.should_exit = server.force_exit = True
        thread.join(DEADLINE_S)
        loop.close()


@dataclass
class LabProcess:
    """`lab serve` as its own process."""

    process: subprocess.Popen[str]
    url: str

    def wait_ready(self, deadline_s: float = DEADLINE_S) -> None:
        until(lambda: self.status() == "ok", deadline_s)

    def status(self) -> str | None:
        """What /health says; None while nothing listens."""
        try:
            return str(CLIENT.get(self.url + "/health").json()["status"])
        except httpx.TransportError:
            return None


@contextlib.contextmanager
def lab_serve(
    *arguments: str,
    preexec_fn: Callable[[], None] | None = None,
    program: tuple[str, ...] = ("-m", "tools.cli"),
    **settings: Any,
) -> Iterator[LabProcess]:
    """Start `lab serve` on a free port and end it with the block, by force if it still runs.

    `preexec_fn` is called in the new process before the service begins. `program` is what Python runs.
    """
    port = free_port()
    assignments = [f"--set={name}={value}" for name, value in {"BACKEND": "null", **settings}.items()]
    process = subprocess.Popen(
        [sys.executable, *program, "serve", f"--port={port}", *assignments, *arguments],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=preexec_fn,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    try:
        yield LabProcess(process, f"http://127.0.0.1:{port}")
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    return port


def until(condition: Callable[[], bool], deadline_s: float = DEADLINE_S) -> None:
    """Wait for `condition`; a test that waits in vain fails."""
    end_s = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end_s, "waited in vain"
        time.sleep(0.005)


def events(body: str) -> list[Any]:
    """The decoded frames of an event stream; "[DONE]" stays a string."""
    assert body.endswith("\n\n"), "a stream ends with a whole frame"
    frames = body.removesuffix("\n\n").split("\n\n")
    data = [frame.removeprefix("data: ") for frame in frames]
    return [text if text == "[DONE]" else json.loads(text) for text in data]


def stream(served_url: str, **fields: Any) -> list[Any]:
    """All frames of one streamed answer."""
    answer = CLIENT.post(served_url + "/generate", json={"stream": True, **fields})
    assert answer.status_code == 200, answer.text
    return events(answer.text)
