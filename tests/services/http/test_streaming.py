"""Streams over real sockets: order, equality with whole answers, half characters, slow readers."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from services.contract.responses import StreamChunk
from services.engine.messages import SequenceUpdate
from tests.services.scripted_engine import ScriptedEngine, last
from tests.services.served import DEADLINE_S, Served, events, serving, stream, until


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving(MAX_BATCH=4, MAX_MODEL_LEN=100_000) as served:
        yield served


@contextmanager
def scripted() -> Iterator[tuple[Served, ScriptedEngine]]:
    engine = ScriptedEngine()
    with serving(engine) as served:
        yield served, engine


@contextmanager
def raw_request(served: Served, **fields: Any) -> Iterator[socket.socket]:
    """A request on a socket of its own, with a small receive buffer and nobody reading."""
    body = json.dumps(fields).encode()
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(DEADLINE_S)
        connection.connect(("127.0.0.1", served.port))
        connection.sendall(
            b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body
        )
        yield connection


def active(served: Served) -> int:
    return int(served.get("/health").json()["active_requests"])


def test_a_stream_is_in_order_and_ends_with_done(served: Served) -> None:
    started_s = time.monotonic()
    frames = stream(served.url, prompt="hello", max_tokens=40, ignore_eos=True)
    assert frames[-1] == "[DONE]"
    chunks = [StreamChunk.model_validate(frame, strict=True) for frame in frames[:-1]]
    assert len({(chunk.id, chunk.created, chunk.model) for chunk in chunks}) == 1
    assert [len(chunk.choices) for chunk in chunks] == [1] * len(chunks)
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    final = chunks[-1].choices[0]
    token_ids = [token_id for chunk in chunks for token_id in chunk.choices[0].token_ids]
    assert len(token_ids) == final.num_output_tokens == 40
    assert final.num_prompt_tokens == len("hello")
    assert final.timings is not None
    assert final.timings.num_steps == 40
    received_s, first_write_s = final.timings.received_s, final.timings.first_write_s
    assert received_s is not None
    assert first_write_s is not None
    waited_s = final.timings.queue_s + final.timings.batch_wait_s + final.timings.prefill_s
    assert started_s <= received_s
    assert final.timings.first_token_s == pytest.approx(received_s + waited_s)
    assert received_s + waited_s <= first_write_s <= time.monotonic()
    assert bytes(token_ids).decode() == "".join(chunk.choices[0].text for chunk in chunks)


@pytest.mark.parametrize(
    "fields",
    [
        {"max_tokens": 30, "ignore_eos": True},
        {"max_tokens": 30, "temperature": 1.5, "seed": 7},
        {"max_tokens": 400, "stop": ["th", "e "]},
    ],
)
def test_a_stream_says_what_the_whole_answer_says(served: Served, fields: dict[str, Any]) -> None:
    whole = served.post(prompt="same", **fields).json()["choices"][0]
    frames = [frame["choices"][0] for frame in stream(served.url, prompt="same", **fields)[:-1]]
    assert [i for frame in frames for i in frame["token_ids"]] == whole["token_ids"]
    assert "".join(frame["text"] for frame in frames) == whole["text"]
    for name in ("finish_reason", "num_prompt_tokens", "num_output_tokens"):
        assert frames[-1][name] == whole[name]


def test_usage_only_where_asked_for(served: Served) -> None:
    fields = {"prompt": ["a", "bc"], "max_tokens": [2, 3], "ignore_eos": True}
    assert not any("usage" in frame for frame in stream(served.url, **fields)[:-1])
    frames = stream(served.url, **fields, stream_options={"include_usage": True})
    assert frames[-2]["choices"] == []
    assert frames[-2]["usage"] == {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8}
    assert not any("usage" in frame for frame in frames[:-2])


def test_prompts_of_one_request_share_frames(served: Served) -> None:
    frames = stream(served.url, prompt=["a", "b", "c"], max_tokens=[1, 4, 9], ignore_eos=True)[:-1]
    counts = {0: 0, 1: 0, 2: 0}
    for frame in frames:
        for choice in frame["choices"]:
            counts[choice["index"]] += len(choice["token_ids"])
    assert counts == {0: 1, 1: 4, 2: 9}
    assert len(frames) < 14
    assert len(frames[0]["choices"]) == 3


def test_the_header_says_event_stream_and_names_the_request(served: Served) -> None:
    answer = httpx.post(
        served.url + "/v1/completions",
        json={"prompt": "a", "stream": True, "max_tokens": 1, "request_id": "mine-1"},
        timeout=DEADLINE_S,
    )
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert answer.headers["x-request-id"] == "mine-1"
    assert events(answer.text)[0]["id"] == "mine-1"


def test_text_never_holds_half_a_character() -> None:
    text = "h\u00e9 \u20ac \U0001f642\u2028!"
    tokens = text.encode()
    with scripted() as (served, engine), raw_request(served, prompt="x", stream=True) as connection:
        until(lambda: len(engine.submitted) == 1)
        seq_id = engine.submitted[0].seq_id
        body = b""
        for number, token in enumerate(tokens, start=1):
            update = last(seq_id, [token]) if number == len(tokens) else SequenceUpdate(seq_id, [token])
            served.call(lambda update=update: engine.step(update))  # type: ignore[misc]
            while body.count(b"data: {") < number:
                body += connection.recv(65_536)
    frames = [json.loads(line[6:])["choices"][0] for line in body.split(b"\n") if line.startswith(b"data: {")]
    assert [frame["token_ids"] for frame in frames] == [[token] for token in tokens]
    assert "".join(frame["text"] for frame in frames) == text
    assert [frame["text"] for frame in frames][:4] == ["h", "", "\u00e9", " "]


def test_frames_merge_for_a_slow_reader() -> None:
    num_prompts, num_tokens = 8, 12_000  # more than the socket buffers hold
    fields = {"prompt": ["a"] * num_prompts, "max_tokens": num_tokens, "ignore_eos": True, "stream": True}
    body = b""
    service = serving(MAX_BATCH=num_prompts, MAX_MODEL_LEN=100_000, MAX_UNREAD_TOKENS=0)
    with service as served, raw_request(served, **fields) as connection:
        until(lambda: len(served.get(f"/steps?after={num_tokens - 1}").json()["steps"]) > 0)
        while not body.endswith(b"\r\n0\r\n\r\n"):
            body += connection.recv(1 << 20)
    num_frames = body.count(b"data: {")
    assert num_frames < num_tokens / 2
    assert body.count(b'"finish_reason":"length"') == num_prompts
    assert body.count(f'"num_output_tokens":{num_tokens},'.encode()) == num_prompts


@pytest.mark.parametrize("streams", [True, False])
def test_a_client_that_leaves_frees_its_place(streams: bool) -> None:
    with serving(MAX_BATCH=1, MAX_MODEL_LEN=100_000, NULL_STEP_MS=1) as served:
        fields = {"max_tokens": 90_000, "ignore_eos": True, "stream": streams}
        with raw_request(served, prompt="running", **fields):
            until(lambda: json.loads(served.get("/steps?after=0").text)["next"] > 3)
            with raw_request(served, prompt="queued", **fields):
                until(lambda: served.get("/health").json()["queue_depth"] == 1)
            until(lambda: served.get("/health").json()["queue_depth"] == 0)
            assert active(served) == 1
        until(lambda: active(served) == 0)
        assert served.post(prompt="next", max_tokens=2).status_code == 200
        assert "lab_requests_cancelled_total{" in served.get("/metrics").text
        cancelled = [line for line in served.get("/metrics").text.splitlines() if "cancelled_total{" in line]
        assert cancelled[0].endswith(" 2.0")


def test_a_leaving_client_is_noticed_though_there_is_nothing_to_write() -> None:
    with scripted() as (served, engine):
        with raw_request(served, prompt="a", stream=True):
            until(lambda: len(engine.submitted) == 1)
            assert engine.cancelled == []
        until(lambda: len(engine.cancelled) == 1)
        assert engine.cancelled == [engine.submitted[0].seq_id]


def test_a_stop_string_cancels_in_the_engine() -> None:
    with (
        scripted() as (served, engine),
        raw_request(served, prompt="a", stop="lo", max_tokens=50) as connection,
    ):
        until(lambda: len(engine.submitted) == 1)
        seq_id = engine.submitted[0].seq_id
        served.call(lambda: engine.step(SequenceUpdate(seq_id, list(b"hel"))))
        assert engine.cancelled == []
        served.call(lambda: engine.step(SequenceUpdate(seq_id, list(b"lo"))))
        assert engine.cancelled == [seq_id]
        served.call(lambda: engine.step(last(seq_id, list(b"!"))))
        answer = connection.recv(65_536)
        assert b'"text":"hel"' in answer
        assert b'"finish_reason":"stop"' in answer


def test_a_failure_in_mid_stream_is_an_error_event_without_done() -> None:
    with scripted() as (served, engine), raw_request(served, prompt="a", stream=True) as connection:
        until(lambda: len(engine.submitted) == 1)
        seq_id = engine.submitted[0].seq_id
        served.call(lambda: engine.step(SequenceUpdate(seq_id, [97])))
        served.call(lambda: engine.step(SequenceUpdate(seq_id, [], "error", None, "device lost")))
        answer = b""
        while not answer.endswith(b"0\r\n\r\n"):
            answer += connection.recv(65_536)
        assert b"200 OK" in answer
        assert b"[DONE]" not in answer
        error = json.loads(answer.rsplit(b"data: ", 1)[1].split(b"\n")[0])["error"]
        assert (error["type"], error["code"]) == ("server_error", "backend_failed")
        assert "device lost" in error["message"]


def test_a_failure_before_the_first_token_is_a_status() -> None:
    with scripted() as (served, engine), raw_request(served, prompt="a", stream=True) as connection:
        until(lambda: len(engine.submitted) == 1)
        seq_id = engine.submitted[0].seq_id
        served.call(lambda: engine.step(SequenceUpdate(seq_id, [], "error", None, "device lost")))
        assert connection.recv(65_536).startswith(b"HTTP/1.1 500 ")
