"""A client that does not read holds up nobody, costs bounded memory, and is cut off with a counted reason."""

from __future__ import annotations

from tests.services.http.test_streaming import active, raw_request
from tests.services.served import Served, serving, until

ENDLESS = {"prompt": "a", "n": 16, "max_tokens": 400_000, "ignore_eos": True, "stream": True}
# A step takes some time: an engine in a thread that never sleeps leaves the API little of a busy machine.
ROOM = {"MAX_MODEL_LEN": 500_000, "NULL_STEP_MS": 0.5}


def num_cut_off(served: Served) -> float:
    lines = served.get("/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if 'reason="slow_reader"' in line)


def assert_others_are_served(served: Served) -> None:
    assert served.post(prompt="next", max_tokens=3).status_code == 200


def test_who_takes_nothing_for_too_long_is_cut_off() -> None:
    settings = {"MAX_UNREAD_TOKENS": 0, "SLOW_READER_TIMEOUT_S": 0.4, **ROOM}
    with serving(MAX_BATCH=17, **settings) as served, raw_request(served, **ENDLESS):
        until(lambda: active(served) == 1)
        assert_others_are_served(served)
        until(lambda: num_cut_off(served) == 1)
        until(lambda: active(served) == 0)
        assert_others_are_served(served)


def test_who_leaves_too_much_unread_is_cut_off() -> None:
    settings = {"MAX_UNREAD_TOKENS": 5000, "SLOW_READER_TIMEOUT_S": 0, **ROOM}
    with serving(MAX_BATCH=17, **settings) as served, raw_request(served, **ENDLESS) as reader:
        until(lambda: num_cut_off(served) == 1)
        until(lambda: active(served) == 0)
        received = bytearray()
        try:
            while piece := reader.recv(1 << 16):
                received += piece
        except ConnectionResetError:
            pass
        assert received.count(b'"token_ids"') < 400_000  # it got a part, and then the end of the connection
        assert b"[DONE]" not in received
        assert_others_are_served(served)


def test_who_reads_slowly_but_steadily_gets_everything() -> None:
    settings = {"MAX_MODEL_LEN": 100_000, "SLOW_READER_TIMEOUT_S": 5}
    with serving(MAX_BATCH=2, **settings) as served:
        fields = {"prompt": "a", "max_tokens": 30_000, "ignore_eos": True, "stream": True}
        with raw_request(served, **fields) as reader:
            body = bytearray()
            while not body.endswith(b"\r\n0\r\n\r\n"):
                body += reader.recv(1 << 14)
        assert b"[DONE]" in body
        assert num_cut_off(served) == 0
