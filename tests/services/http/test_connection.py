"""What a client may send before its request is known, and how many may be connected."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import socket
import struct
import threading
import time
from collections.abc import Iterator

import pytest
from fastapi import Request

from adapters.base import ConfigError
from services.contract.status import Health
from services.core.service import Service
from services.http import connection as limits
from services.http.connection import MAX_HEAD_BYTES, MAX_HEADERS, max_connections
from services.http.handler import RequestHandler
from tests.services.engine_client.test_worker import engine_pid
from tests.services.served import CLIENT, DEADLINE_S, Served, lab_serve, serving, until

HEALTH = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=DEADLINE_S)


def answer_to(served: Served, *pieces: bytes) -> tuple[int, str]:
    """Status and error code of what comes until the service closes the connection."""
    with connect(served.port) as client:
        received = b""
        with contextlib.suppress(ConnectionError):
            for piece in pieces:
                client.sendall(piece)
        with contextlib.suppress(ConnectionError):
            while data := client.recv(1 << 16):
                received += data
    head, _, body = received.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["error"]["code"]


def health_over(client: socket.socket) -> bytes:
    """The status line of one answer, which is read whole."""
    client.sendall(HEALTH)
    received = b""
    while not received.endswith(b"}") and (data := client.recv(1 << 16)):
        received += data
    return received.partition(b"\r\n")[0]


def send_for_ever(client: socket.socket, piece: bytes) -> None:
    begin_s = time.monotonic()
    while time.monotonic() < begin_s + DEADLINE_S:
        client.sendall(piece)


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving(API_KEY="a-long-secret") as served:
        yield served


@pytest.mark.parametrize(
    "head",
    [
        b"GET /" + b"x" * MAX_HEAD_BYTES + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: x\r\nX-Long: " + b"x" * MAX_HEAD_BYTES + b"\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: x\r\n" + b"x: y\r\n" * MAX_HEADERS + b"\r\n",
        b"GET /health HTTP/1.1\r\nHost: x\r\nX-Endless: " + b"x" * 4_000_000,
        b"GET /" + b"x" * 4_000_000,
    ],
    ids=["url", "header", "many", "endless header", "endless url"],
)
@pytest.mark.parametrize("whole", [True, False])
def test_a_large_head_is_refused_before_the_key_is_asked_for(
    served: Served, head: bytes, whole: bool
) -> None:
    pieces = [head] if whole else [head[i : i + 5000] for i in range(0, len(head), 5000)]
    assert answer_to(served, *pieces) == (431, "headers_too_large")
    assert served.get("/health").status_code == 200


def test_a_head_just_below_the_limit_is_read(served: Served) -> None:
    headers = {f"x-{i}": "v" * 600 for i in range(100)}
    assert CLIENT.get(served.url + "/health", headers=headers).status_code == 200
    body = {"prompt": "a" * 500_000}  # a body does not count
    assert CLIENT.post(served.url + "/generate", json=body).status_code == 401


def test_what_is_no_http_gets_an_error_in_our_shape(served: Served) -> None:
    assert answer_to(served, b"\x16\x03\x01 hello\r\n\r\n") == (400, "invalid_http")


def test_more_requests_at_once_than_may_wait_are_refused(served: Served) -> None:
    with connect(served.port) as client:
        client.sendall(HEALTH * 5000)
        received = b""
        with contextlib.suppress(ConnectionError):
            while data := client.recv(1 << 16):
                received += data
    assert received.count(b"HTTP/1.1 200") <= 2 * limits.MAX_PIPELINED


def test_a_few_requests_at_once_are_answered_in_order(served: Served) -> None:
    with connect(served.port) as client:
        client.sendall(HEALTH * 4)
        received = b""
        while received.count(b'"status"') < 4:
            received += client.recv(1 << 16)


def test_who_sends_no_whole_head_in_time_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "HEAD_TIMEOUT_S", 0.5)
    with serving() as served, connect(served.port) as silent, connect(served.port) as slow:
        slow.sendall(b"GET /health HTTP/1.1\r\nHost")
        assert silent.recv(100) == b""
        assert slow.recv(100).startswith(b"HTTP/1.1 408")
        with connect(served.port) as second:
            assert health_over(second) == b"HTTP/1.1 200 OK"
            time.sleep(0.7)  # between its requests a connection has more time
            assert health_over(second) == b"HTTP/1.1 200 OK"
            second.sendall(b"G")
            assert second.recv(100).startswith(b"HTTP/1.1 408")


def test_an_unwanted_body_is_not_read_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "LINGER_S", 0.2)
    with serving(API_KEY="a-long-secret") as served, connect(served.port) as client:
        client.sendall(b"POST /generate HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        with pytest.raises(ConnectionError):
            send_for_ever(client, b"5\r\nhello\r\n")


def test_a_new_connection_takes_the_place_of_a_silent_one() -> None:
    with serving(MAX_CONNECTIONS=8) as served, contextlib.ExitStack() as stack:
        silent = [stack.enter_context(connect(served.port)) for _ in range(8)]
        until(lambda: served.call(lambda: served.service.health().status) == "ok")
        with connect(served.port) as ninth:
            assert health_over(ninth) == b"HTTP/1.1 200 OK"
            assert silent[0].recv(100) == b""
            assert health_over(silent[7]) == b"HTTP/1.1 200 OK"


def test_where_all_connections_have_a_request_health_is_still_answered() -> None:
    endless = json.dumps({"prompt": "a", "max_tokens": 4000, "ignore_eos": True, "stream": True}).encode()
    post = b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(endless) + endless
    with (
        serving(MAX_CONNECTIONS=2, NULL_STEP_MS=5) as served,
        connect(served.port) as first,
        connect(served.port) as second,
    ):
        for client in (first, second):
            client.sendall(post)
            assert client.recv(100).startswith(b"HTTP/1.1 200")
        with connect(served.port) as third:
            assert health_over(third) == b"HTTP/1.1 200 OK"
            third.sendall(b"GET /model HTTP/1.1\r\nHost: x\r\n\r\n")
            assert third.recv(100).startswith(b"HTTP/1.1 503")
        assert first.recv(1)
        assert second.recv(1)


def test_descriptors_are_kept_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 1024))
    kept = 1024 - max_connections(None)
    assert kept >= 64
    assert max_connections(500) == 500
    with pytest.raises(ConfigError, match=f"ulimit -n\\) to {2000 + kept} or lower MAX_CONNECTIONS"):
        max_connections(2000)


def test_the_engine_is_replaced_beside_more_silent_connections_than_there_are_descriptors() -> None:
    def lower() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (192, 192))

    with lab_serve(preexec_fn=lower) as lab, contextlib.ExitStack() as stack:
        lab.wait_ready()
        port = int(lab.url.rsplit(":", 1)[1])
        silent = [stack.enter_context(connect(port)) for _ in range(300)]
        assert lab.status() == "ok"
        os.kill(engine_pid(lab), signal.SIGKILL)
        until(lambda: lab.status() != "ok")
        silent += [stack.enter_context(connect(port)) for _ in range(100)]
        lab.wait_ready()
        assert CLIENT.post(lab.url + "/generate", json={"prompt": "a", "max_tokens": 2}).status_code == 200


def post(body: bytes, *headers: bytes) -> bytes:
    head = [b"POST /generate HTTP/1.1", b"Host: x", b"Authorization: Bearer a-long-secret", *headers]
    return b"\r\n".join([*head, b"Content-Length: %d" % len(body), b"", body])


CHUNKED = post(b"", b"Transfer-Encoding: chunked").replace(b"Content-Length: 0\r\n", b"") + b"2\r\n{}\r\n"


@pytest.mark.parametrize(
    "tail",
    [b"0\r\nX-Endless: ", b"2;x=", b"0\r\n" + b"x: y\r\n" * MAX_HEADERS],
    ids=["trailer", "chunk", "many"],
)
def test_what_a_chunked_body_has_beside_its_bytes_is_limited(served: Served, tail: bytes) -> None:
    pieces = [CHUNKED + tail] + [b"x" * 5000] * 200
    assert answer_to(served, *pieces) == (431, "headers_too_large")


def test_a_body_in_tiny_pieces_with_much_around_them_is_refused(served: Served) -> None:
    pieces = [(b"1;" + b"y" * 60 + b"\r\n \r\n") * 1000] * 20
    assert answer_to(served, CHUNKED, *pieces) == (400, "chunks_too_small")


def test_a_body_that_cannot_be_parsed_gets_an_error(served: Served) -> None:
    assert answer_to(served, CHUNKED, b"what\r\n") == (400, "invalid_http")


def test_a_body_of_many_small_chunks_is_read(served: Served) -> None:
    with connect(served.port) as client:
        client.sendall(
            CHUNKED.replace(b"2\r\n{}", b"1\r\n{") + b"1\r\n \r\n" * 40_000 + b"1\r\n}\r\n0\r\n\r\n"
        )
        assert client.recv(100).startswith(b"HTTP/1.1 422")


@pytest.mark.parametrize("is_cut", [False, True])
def test_who_asks_for_another_protocol_is_answered_in_this_one(served: Served, is_cut: bool) -> None:
    request = post(
        b'{"prompt":"a","max_tokens":1}',
        b"Connection: Upgrade, HTTP2-Settings",
        b"HTTP2-Settings: AA",
        b"upgrade: h2c",
    )
    with connect(served.port) as client:
        for _ in range(2):
            at = request.index(b"\r\n\r\n") + 4 if is_cut else len(request)
            client.sendall(request[:at])
            time.sleep(0.05)
            client.sendall(request[at:])
            received = b""
            while not received.endswith(b"}}"):
                received += client.recv(1 << 16)
            assert received.startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize(
    "body",
    [
        b'{"prompt":"a","max_tokens":3000,"ignore_eos":true}',
        b'{"prompt":"a","max_tokens":3000,"ignore_eos":true,"stream":true}',
    ],
)
def test_who_leaves_with_requests_pipelined_leaves_all_of_them(
    body: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    with serving(API_KEY="a-long-secret", NULL_STEP_MS=5) as served:
        with connect(served.port) as client:
            client.sendall(post(body) * 2)
            until(lambda: served.get("/health").json()["active_requests"] == 1)
        until(lambda: served.get("/health").json()["active_requests"] == 0, 3.0)
    assert not [record for record in caplog.records if record.exc_info]


def test_requests_beside_one_that_is_refused_leave_no_error_in_the_log(
    served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(5):
        assert answer_to(served, post(b'{"prompt":"a"}') + b"\x00 what\r\n\r\n") == (400, "invalid_http")
    assert not [record for record in caplog.records if record.exc_info]


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the service began to work on, in order."""
    begun: list[str] = []
    read_body, health = RequestHandler._read_body, Service.health

    async def noted_read(self: RequestHandler, http: Request, body: bytearray) -> bool:
        begun.append("request")
        return await read_body(self, http, body)

    def noted_health(self: Service) -> Health:
        begun.append("health")
        return health(self)

    monkeypatch.setattr(RequestHandler, "_read_body", noted_read)
    monkeypatch.setattr(Service, "health", noted_health)
    return begun


def test_health_does_not_wait_behind_a_crowd_that_sends_at_once(begun: list[str]) -> None:
    with serving() as served, contextlib.ExitStack() as stack:
        loop_is_held = threading.Event()
        served.loop.call_soon_threadsafe(loop_is_held.wait, DEADLINE_S)
        crowd = [stack.enter_context(connect(served.port)) for _ in range(40)]
        for client in crowd:
            client.sendall(post(b'{"prompt":"hello","max_tokens":1}'))
        last = stack.enter_context(connect(served.port))
        last.sendall(HEALTH)
        loop_is_held.set()
        until(lambda: len(begun) == 41)
    assert begun.index("health") < 5


def test_who_left_before_its_turn_costs_nothing_more(begun: list[str]) -> None:
    with serving() as served:
        loop_is_held = threading.Event()
        served.loop.call_soon_threadsafe(loop_is_held.wait, DEADLINE_S)
        for _ in range(40):
            with connect(served.port) as client:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                client.sendall(post(b'{"prompt":"hello","max_tokens":1}'))
        loop_is_held.set()
        with connect(served.port) as client:
            assert health_over(client).endswith(b" 200 OK")
            client.sendall(post(b'{"prompt":"hello","max_tokens":1}'))
            assert client.recv(100).startswith(b"HTTP/1.1 200")
    assert begun.count("request") < 10
