"""Clients that mean harm, each a program: `python -m tests.services.attackers NAME PORT SECONDS`.

Each does one thing as fast as it can. They run in a process of their own, beside the one that measures.
"""

from __future__ import annotations

import contextlib
import json
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

ATTACKS: dict[str, Callable[[int], None]] = {}
"""One round of each attack, on a port; it is repeated until the time is over."""


def attack(name: str) -> Callable[[Callable[[int], None]], Callable[[int], None]]:
    def add(act: Callable[[int], None]) -> Callable[[int], None]:
        ATTACKS[name] = act
        return act

    return add


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=10)


def send_on(port: int, *pieces: bytes, times: int = 1) -> None:
    """One connection that sends and never reads, until it is closed."""
    with contextlib.suppress(OSError), connect(port) as client:
        for _ in range(times):
            for piece in pieces:
                client.sendall(piece)


def posted(path: str, **fields: Any) -> bytes:
    return with_body(path, json.dumps(fields).encode())


def with_body(path: str, body: bytes) -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def answered(port: int, request: bytes) -> None:
    """Send a request and read its answer to the end."""
    with contextlib.suppress(OSError), connect(port) as client:
        client.sendall(request)
        while client.recv(1 << 16):
            pass


def side_by_side(count: int, act: Callable[[], None]) -> None:
    threads = [threading.Thread(target=act, daemon=True) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@attack("endless headers")
def endless_headers(port: int) -> None:
    send_on(port, b"GET /health HTTP/1.1\r\nHost: x\r\nX-Long: ")
    send_on(port, b"GET /health HTTP/1.1\r\nX-Long: ", b"x" * (1 << 20), times=200)
    send_on(port, b"GET /health HTTP/1.1\r\n", b"x-short: y\r\n" * 50_000, times=200)


@attack("endless url")
def endless_url(port: int) -> None:
    send_on(port, b"GET /" + b"x" * (1 << 20), b"x" * (1 << 20), times=200)


@attack("silent connections")
def silent_connections(port: int) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(1500):
            with contextlib.suppress(OSError):
                stack.enter_context(connect(port))
        time.sleep(0.5)


@attack("pipelined requests")
def pipelined(port: int) -> None:
    send_on(port, b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n" * 5000, times=20)


@attack("endless bodies")
def endless_bodies(port: int) -> None:
    head = b"POST /generate HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    chunk = b"100000\r\n" + b"x" * (1 << 20) + b"\r\n"
    side_by_side(8, lambda: send_on(port, head, *[chunk] * 16))


@attack("chunk trailers")
def chunk_trailers(port: int) -> None:
    head = b"POST /generate HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    trailers = b"x-trailer: " + b"y" * 100 + b"\r\n"
    send_on(port, head + b"2\r\n{}\r\n0\r\n", *[trailers * 5000] * 20)
    send_on(port, head + b"2;x=", *[b"y" * (1 << 20)] * 20)
    send_on(port, head, *[(b"1;" + b"y" * 60 + b"\r\nx\r\n") * 15_000] * 20)


@attack("long chats")
def long_chats(port: int) -> None:
    messages = [{"role": "user", "content": "hello world, this. " * 50_000}] * 4
    request = posted("/v1/chat/completions", messages=messages, max_tokens=1)
    side_by_side(4, lambda: answered(port, request))


@attack("long prompts")
def long_prompts(port: int) -> None:
    request = posted("/generate", prompt=["hello world, this. " * 2500] * 80, max_tokens=1)
    side_by_side(4, lambda: answered(port, request))


@attack("many lists")
def many_lists(port: int) -> None:
    request = with_body("/v1/generate", b'{"prompt": [' + b"[1]," * 1_000_000 + b"[1]]}")
    side_by_side(4, lambda: answered(port, request))


@attack("many prompts, closed last first")
def many_prompts(port: int) -> None:
    request = posted("/generate", prompt=["hello"] * 256, max_tokens=500, ignore_eos=True, stream=True)
    clients = []
    for _ in range(256):
        with contextlib.suppress(OSError):
            client = connect(port)
            clients.append(client)
            client.sendall(request)
    time.sleep(0.2)
    for client in reversed(clients):
        client.close()


@attack("crafted stop strings")
def stop_strings(port: int) -> None:
    stops = ["a" * (240 + i) + "b" for i in range(16)]
    fields = {"prompt": "a" * 400, "n": 8, "max_tokens": 200, "stop": stops, "temperature": 2.0}
    side_by_side(2, lambda: answered(port, posted("/generate", stream=True, ignore_eos=True, **fields)))


@attack("long answers alone")
def nobatch(port: int) -> None:
    request = posted("/v1/generate_nobatch", prompt="hello", max_tokens=1000, ignore_eos=True)
    side_by_side(4, lambda: answered(port, request))


@attack("streams that nobody reads")
def unread(port: int) -> None:
    request = posted("/generate", prompt=["hello"] * 8, max_tokens=500, ignore_eos=True, stream=True)
    with contextlib.ExitStack() as stack:
        for _ in range(8):
            with contextlib.suppress(OSError):
                stack.enter_context(connect(port)).sendall(request)
        time.sleep(2.0)


def rounds(act: Callable[[int], None], port: int, until_s: float) -> Iterator[int]:
    number = 0
    while time.monotonic() < until_s:
        act(port)
        number += 1
        yield number


def main() -> None:
    name, port, seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
    for number in rounds(ATTACKS[name], port, time.monotonic() + seconds):
        print(number, flush=True)


if __name__ == "__main__":
    main()
