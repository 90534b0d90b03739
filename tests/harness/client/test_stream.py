"""The streaming client against a real socket: what it stamps, counts and calls an error."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from time import perf_counter
from typing import Any

import pytest

from harness.client.answer import Answer
from harness.client.connection import Origin
from harness.client.server_kind import Call
from harness.client.stream import StreamClient
from harness.client.target import Dialect, Target, completions_paths, parse_origin
from harness.plan.schedule import PlannedRequest
from harness.replay.event_loop import loop_factory
from harness.results.record import ReplayLabels, make_row, make_table
from services.contract.requests import ChatMessage
from tests.harness.fake_server import (
    END,
    STREAM_HEAD,
    Answering,
    FakeServer,
    HangUp,
    answer_all,
    chunk,
    entry,
    event,
    json_response,
    lab_tokens,
    wait_until,
)

PLAN = PlannedRequest(index=0, prompt_id="p0", prompt="Hello", max_tokens=3, seed=5)


def target(server: FakeServer, **changes: Any) -> Target:
    return replace(Target(Origin("127.0.0.1", server.port), "/generate"), **changes)


def ask(
    answer: Answering,
    *,
    plans: list[PlannedRequest] | None = None,
    answers: list[Answer] | None = None,
    timeout_s: float = 5.0,
    uvloop: bool = True,
    **changes: Any,
) -> tuple[list[Answer], FakeServer]:
    """Send one request for `plans` and return its answers."""
    answers = answers or [Answer(plan, 0.0) for plan in plans or [PLAN]]
    with FakeServer(answer) as server:
        factory = loop_factory() if uvloop else asyncio.new_event_loop
        with asyncio.Runner(loop_factory=factory) as runner:
            client = StreamClient(target(server, **changes), timeout_s=timeout_s)
            runner.run(client.send(answers, 0))
            client.close()
    return answers, server


def scripted(*pieces: bytes, hang_up: bool = False, wait_s: float = 0.0) -> Answering:
    async def answer(body: dict[str, Any]) -> AsyncIterator[bytes]:
        for piece in pieces:
            yield piece
            await asyncio.sleep(wait_s)
        if hang_up:
            raise HangUp

    return answer


def in_lockstep(answer: Answer, choices: list[dict[str, Any]], sent: list[float]) -> Answering:
    """Sends an event once the client has stamped what came before, and notes when."""

    async def answering(body: dict[str, Any]) -> AsyncIterator[bytes]:
        yield STREAM_HEAD
        num_tokens = 0
        for choice in choices:
            await wait_until(lambda: len(answer.chunk_s) >= num_tokens)  # noqa: B023 - awaited at once
            sent.append(perf_counter())
            yield event({"id": "cmpl-1", "choices": [choice]})
            num_tokens += bool(choice["token_ids"])
        yield event("[DONE]")
        yield END

    return answering


def ask_in_lockstep(choices: list[dict[str, Any]], *, uvloop: bool = True) -> tuple[Answer, list[float]]:
    answer, sent = Answer(PLAN, 0.0), list[float]()
    ask(in_lockstep(answer, choices, sent), answers=[answer], uvloop=uvloop)
    return answer, sent


@pytest.mark.parametrize("uvloop", [True, False])
def test_one_prompt_is_stamped_chunk_by_chunk(uvloop: bool) -> None:
    choices = [entry(0, [10]), entry(0, [11, 12]), entry(0, [13], 4)]
    answer, sent = ask_in_lockstep(choices, uvloop=uvloop)
    assert answer.error is None
    assert answer.is_complete
    assert answer.token_ids == [10, 11, 12, 13]
    assert answer.chunk_tokens == [1, 2, 1]
    assert answer.sent_s is not None
    assert answer.sent_s < sent[0]
    # Each stamp lies between the sending of its own event and that of the next.
    assert all(s <= stamp for s, stamp in zip(sent, answer.chunk_s, strict=True))
    assert all(stamp <= s for stamp, s in zip(answer.chunk_s, sent[1:], strict=False))
    assert answer.finish_s == answer.chunk_s[-1]
    assert (answer.num_prompt_tokens, answer.num_output_tokens) == (7, 4)
    assert answer.timings["mean_batch_size"] == 2.5
    assert answer.server_request_id == "cmpl-1"


def test_sampling_is_always_explicit_and_a_single_prompt_needs_no_lists() -> None:
    _, server = ask(answer_all, temperature=0.5)
    assert json.loads(server.bodies[0]) == {
        "prompt": "Hello", "max_tokens": 3, "seed": 5, "temperature": 0.5, "ignore_eos": True, "stream": True,
    }  # fmt: skip


def test_answers_may_end_where_the_model_ends_them() -> None:
    target = Target(Origin("127.0.0.1", 1), "/generate", ignore_eos=False)
    assert json.loads(target.body([PLAN]))["ignore_eos"] is False


@pytest.mark.parametrize(
    ("dialect", "path", "expected", "fields"),
    [
        ("lab", "/generate", "/generate", {"prompt": "Hello", "chat": True}),
        (
            "openai",
            "/v1/completions",
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": "Hello"}], "model": "m"},
        ),
        ("openai", "/v1/chat/completions", "/v1/chat/completions", {"model": "m"}),
    ],
)
def test_a_message_of_a_chat_is_sent_as_one(
    dialect: Dialect, path: str, expected: str, fields: dict[str, Any]
) -> None:
    target = Target(Origin("127.0.0.1", 1), path, dialect, "m")
    body = json.loads(target.body([replace(PLAN, is_chat=True)]))
    assert body | fields == body
    assert ("prompt" in body) == (dialect == "lab")
    assert target.request(b"", is_chat=True).startswith(f"POST {expected} HTTP/1.1\r\n".encode())


@pytest.mark.parametrize("dialect", ["lab", "openai"])
def test_the_turns_of_a_chat_are_sent_beside_those_of_others(dialect: Dialect) -> None:
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]
    messages = tuple(ChatMessage.model_validate(turn) for turn in turns)
    chat = replace(PLAN, prompt="", is_chat=True, messages=messages)
    target = Target(Origin("127.0.0.1", 1), "/generate", dialect, "m")
    body = json.loads(target.body([chat]))
    assert body["messages"] == turns
    assert "prompt" not in body
    assert "chat" not in body
    single = replace(PLAN, is_chat=True)
    body = json.loads(Target(Origin("127.0.0.1", 1), "/generate").body([single, chat]))
    assert body["messages"] == [[{"role": "user", "content": "Hello"}], turns]


@pytest.mark.parametrize("dialect", ["lab", "openai"])
def test_client_and_class_are_sent_where_the_corpus_has_them(dialect: Dialect) -> None:
    target = Target(Origin("127.0.0.1", 1), "/generate", dialect, "m")
    assert not {"user", "priority"} & json.loads(target.body([PLAN])).keys()
    body = json.loads(target.body([replace(PLAN, user="a", priority=0), replace(PLAN, user="b")]))
    assert (body["user"], body["priority"]) == ("a", 0)


def test_the_text_of_a_chat_stream_is_read() -> None:
    async def answer_chat(body: dict[str, Any]) -> AsyncIterator[bytes]:
        yield STREAM_HEAD
        for delta in ({"role": "assistant", "content": ""}, {"content": "4"}, {"content": "."}):
            yield event({"choices": [{"index": 0, "delta": delta, "finish_reason": None}]})
        yield event({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
        yield event({"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 2}})
        yield event("[DONE]")
        yield END

    answers, _ = ask(answer_chat, dialect="openai", plans=[replace(PLAN, is_chat=True)])
    (answer,) = answers
    assert (answer.error, "".join(answer.text), len(answer.chunk_s)) == (None, "4.", 2)


def test_prompts_of_one_request_are_told_apart_by_index() -> None:
    plans = [replace(PLAN, index=i, prompt="x" * (i + 1), max_tokens=i + 1, seed=i) for i in range(4)]
    answers, server = ask(answer_all, plans=plans)
    body = json.loads(server.bodies[0])
    assert (body["max_tokens"], body["seed"]) == ([1, 2, 3, 4], [0, 1, 2, 3])
    for plan, answer in zip(plans, answers, strict=True):
        assert answer.token_ids == lab_tokens(plan.prompt, plan.seed, plan.max_tokens)
        assert answer.group_size == 4
    ends = [answer.finish_s for answer in answers]
    assert ends == sorted(ends)
    digest = hashlib.sha256(server.bodies[0]).hexdigest()
    assert {answer.body_sha256 for answer in answers} == {digest}


def test_output_hash_is_over_the_token_ids() -> None:
    (answer,), _ = ask(answer_all)
    ids = ",".join(map(str, lab_tokens("Hello", 5, 3)))
    assert answer.output_sha256 == hashlib.sha256(ids.encode()).hexdigest()


def test_an_event_without_a_token_is_no_first_token() -> None:
    answer, sent = ask_in_lockstep([entry(0, [], text=""), entry(0, [1, 2], 2)])
    assert answer.chunk_tokens == [2]
    assert answer.chunk_s[0] >= sent[1]


def test_held_back_text_is_no_token() -> None:
    tail = entry(0, [], 2, text="é")
    (answer,), _ = ask(
        scripted(STREAM_HEAD, event({"choices": [entry(0, [1, 2])]}), event({"choices": [tail]}), END)
    )
    assert (answer.error, answer.chunk_tokens, answer.has_token_ids) == (None, [2], True)
    assert "".join(answer.text) == " wé"


def test_bytes_may_be_cut_anywhere() -> None:
    payload = json.dumps({"choices": [entry(0, [1], 1, text="a\u2028b\u0085é")]}, ensure_ascii=False)
    stream = STREAM_HEAD + chunk(f"data: {payload}\r\n\r\ndata: [DONE]\r\n\r\n".encode()) + END
    (answer,), _ = ask(scripted(*(stream[i : i + 1] for i in range(len(stream)))))
    assert answer.error is None
    assert "".join(answer.text) == "a\u2028b\u0085é"


def test_foreign_server_counts_come_from_usage() -> None:
    def said(text: str, reason: str | None = None) -> bytes:
        return event({"choices": [{"index": 0, "text": text, "finish_reason": reason}]})

    usage = event({"choices": [], "usage": {"prompt_tokens": 4, "completion_tokens": 9, "total_tokens": 13}})
    (answer,), server = ask(
        scripted(
            STREAM_HEAD, said(""), said("a b c"), said(" d"), said("", "length"), usage, event("[DONE]"), END
        ),
        dialect="openai",
        model="m",
        path="/v1/completions",
        api_key="secret",
    )
    assert answer.error is None
    assert (answer.num_prompt_tokens, answer.num_output_tokens) == (4, 9)
    assert (len(answer.chunk_s), answer.has_token_ids, answer.output_sha256) == (2, False, None)
    assert answer.text_sha256 == hashlib.sha256(b"a b c d").hexdigest()
    body = json.loads(server.bodies[0])
    assert body["model"] == "m"
    assert body["stream_options"] == {"include_usage": True}
    assert (body["ignore_eos"], body["temperature"], body["seed"]) == (True, 0.0, 5)
    assert "Authorization: Bearer secret\r\n" in server.heads[0]


TOKEN = event({"choices": [entry(0, [1])]})
FAILURE = {
    "error": {"message": "engine died", "type": "server_error", "param": None, "code": "engine_failed"}
}


@pytest.mark.parametrize(
    ("answering", "expected"),
    [
        pytest.param(
            scripted(json_response(429, {"error": {"message": "queue is full", "code": "queue_full"}})),
            "http 429: queue_full: queue is full",
            id="refused",
        ),
        pytest.param(
            scripted(json_response(400, {"error": {"message": "a\x1b[31m\nb\ud83d"}})),
            r"http 400: a\x1b[31m\nb\ud83d",
            id="control characters",
        ),
        pytest.param(
            scripted(b"HTTP/1.1 500 X\r\n\r\n" + b"[" * 60_000, hang_up=True), "http 500: [[", id="too deep"
        ),
        pytest.param(
            scripted(b"HTTP/1.1 502 X\r\nContent-Length: 3\r\n\r\nbad"), "http 502: bad", id="not json"
        ),
        pytest.param(
            scripted(json_response(200, {"choices": []})), "answered application/json, not", id="unstreamed"
        ),
        pytest.param(
            scripted(STREAM_HEAD, TOKEN, event(FAILURE), END),
            "in mid-stream: engine_failed",
            id="error event",
        ),
        pytest.param(scripted(STREAM_HEAD, TOKEN, hang_up=True), "connection closed", id="early end"),
        pytest.param(scripted(STREAM_HEAD, TOKEN, END), "before the answer did", id="no finishing entry"),
        pytest.param(
            scripted(STREAM_HEAD, TOKEN, event("[DONE]"), END), "before the answer did", id="done too soon"
        ),
        pytest.param(scripted(STREAM_HEAD, event("{not json"), END), "unreadable event", id="bad json"),
        pytest.param(scripted(STREAM_HEAD, event("[1]"), END), "unreadable event", id="not an object"),
        pytest.param(
            scripted(STREAM_HEAD, event({"choices": [entry(7, [1])]}), END), "index 7", id="unknown index"
        ),
        *(
            pytest.param(
                scripted(STREAM_HEAD, TOKEN, chunk(words), END), f"in mid-stream: {expected}", id=name
            )
            for name, words, expected in (
                (
                    "llama-server of 2025",
                    b'error: {"code":400,"message":"too long","type":"x"}\n\ndata: [DONE]\n\n',
                    "400: too long",
                ),
                ("plain words", b"error: out of memory\n\n", "out of memory"),
                (
                    "error object",
                    b'data: {"object":"error","message":"too long","type":"BadRequestError","code":400}\n\n',
                    "400: too long",
                ),
                ("bare JSON", b'{"error": "graph failed"}', "graph failed"),
                ("bare JSON, then done", b'{"error": "graph failed"}\n\ndata: [DONE]\n\n', "graph failed"),
                ("bare JSON in lines", b'{\n\t"error": "graph failed"\n}', "graph failed"),
                ("error event of text", b"event: error\ndata: out of memory\n\n", "out of memory"),
                ("error event of JSON", b'event:error\ndata: {"message":"gone"}\n\n', "gone"),
                ("error event with its object", b'event: error\ndata: {"error":"gone"}\n\n', "gone"),
            )
        ),
        pytest.param(
            scripted(json_response(200, {"error": {"message": "no such model", "code": 404}})),
            "answered application/json, not an event stream: 404: no such model",
            id="error with status 200",
        ),
        pytest.param(
            scripted(json_response(400, {"object": "error", "message": "bad seed", "code": 400})),
            "http 400: 400: bad seed",
            id="refused with an error object",
        ),
        pytest.param(scripted(b"SSH-2.0-nonsense\r\n"), "not a readable HTTP response", id="not http"),
        pytest.param(scripted(hang_up=True), "connection closed", id="no answer"),
        pytest.param(
            scripted(
                STREAM_HEAD,
                event({"choices": [{"index": 0, "text": "a", "finish_reason": "stop"}]}),
                event("[DONE]"),
                END,
            ),
            "no usage",
            id="no counts",
        ),
        pytest.param(
            scripted(STREAM_HEAD, event({"choices": [entry(0, [1], 1) | {"finish_reason": "abort"}]}), END),
            "finish_reason abort",
            id="aborted by the server",
        ),
    ],
)
def test_each_failure_becomes_the_error_of_its_row(answering: Answering, expected: str) -> None:
    (answer,), _ = ask(answering)
    assert answer.is_complete
    assert answer.error is not None
    assert expected in answer.error
    assert answer.finish_s is not None


def test_a_request_that_takes_too_long_fails() -> None:
    (answer,), _ = ask(scripted(STREAM_HEAD + TOKEN, TOKEN, wait_s=60.0), timeout_s=0.3)
    assert answer.error == "timeout: no complete answer within 0.3 s"
    assert answer.chunk_tokens == [1]


def test_a_server_that_is_not_there_fails_the_request() -> None:
    with FakeServer() as server:
        gone = target(server)
    answer = Answer(PLAN, 0.0)
    asyncio.run(StreamClient(gone).send([answer], 0))
    assert (answer.error or "").startswith("connect: ")


def test_answers_that_finished_survive_the_end_of_their_stream() -> None:
    plans = [PLAN, replace(PLAN, index=1)]
    first = event({"choices": [entry(0, [1], 1), entry(1, [1])]})
    answers, _ = ask(scripted(STREAM_HEAD, first, hang_up=True), plans=plans)
    assert answers[0].error is None
    assert "connection closed" in (answers[1].error or "")


def run_in_turn(answer: Answering, num: int) -> tuple[list[Answer], FakeServer]:
    async def main() -> list[Answer]:
        client = StreamClient(target(server))
        answers = [Answer(PLAN, 0.0) for _ in range(num)]
        for one in answers:
            await client.send([one], 0)
        client.close()
        return answers

    with FakeServer(answer) as server:
        return asyncio.run(main()), server


def test_connections_are_kept_alive_and_used_again() -> None:
    answers, server = run_in_turn(answer_all, 5)
    assert [answer.error for answer in answers] == [None] * 5
    assert server.num_connections == 1


def test_a_connection_closed_while_idle_costs_no_request() -> None:
    async def once(body: dict[str, Any]) -> AsyncIterator[bytes]:
        async for piece in answer_all(body):
            yield piece
        raise HangUp

    answers, server = run_in_turn(once, 3)
    assert [answer.error for answer in answers] == [None] * 3
    assert server.num_connections == 3


def test_a_connection_closed_at_reuse_is_tried_once_more() -> None:
    seen: list[int] = []

    async def drops_the_second(body: dict[str, Any]) -> AsyncIterator[bytes]:
        seen.append(1)
        if len(seen) == 2:
            raise HangUp
        async for piece in answer_all(body):
            yield piece

    answers, server = run_in_turn(drops_the_second, 2)
    assert [answer.error for answer in answers] == [None, None]
    assert len(server.bodies) == 3


@pytest.mark.parametrize(
    ("url", "host", "port", "path"),
    [
        ("http://localhost:8000", "localhost", 8000, "/v1/completions"),
        ("http://h/v1/", "h", 80, "/v1/completions"),
        ("https://h", "h", 443, "/v1/completions"),
        ("http://[::1]:9/api/v1/completions", "::1", 9, "/api/v1/completions"),
        ("http://h/v3", "h", 80, "/v3/completions"),
        ("http://h/v3/v1/", "h", 80, "/v3/v1/completions"),
    ],
)
def test_urls_name_the_completions_endpoint(url: str, host: str, port: int, path: str) -> None:
    origin, prefix = parse_origin(url)
    assert (origin.host, origin.port, completions_paths(prefix)[0]) == (host, port, path)
    assert origin.is_tls == url.startswith("https")


def eight_words(usage: Callable[[int], Any], reason: Any, last: str = "length") -> list[dict[str, Any]]:
    """Events of an answer of eight tokens, as `usage` after each and `reason` on all but the last say."""
    events = [
        {"choices": [{"index": 0, "text": " w", "finish_reason": reason}], "usage": usage(n + 1)}
        for n in range(8)
    ]
    end = {"choices": [{"index": 0, "text": "", "finish_reason": last}], "usage": usage(8)}
    return [*events, end]


NO_REASONS = ("", " ", "null", "NULL", "none", "None", False, 0, [], {})
FINAL_USAGE = {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 8}}


@pytest.mark.parametrize(
    "events",
    [
        eight_words(lambda n: {"prompt_tokens": 5, "completion_tokens": n}, None),
        [*eight_words(lambda n: {"prompt_tokens": 5, "completion_tokens": n - 1}, None), FINAL_USAGE],
        [*eight_words(lambda n: {"prompt_tokens": 5, "completion_tokens": 0}, None), FINAL_USAGE],
        [*eight_words(lambda n: {"prompt_tokens": 5, "completion_tokens": "?"}, None), FINAL_USAGE],
        eight_words(lambda n: {"prompt_tokens": 5.0, "completion_tokens": float(n)}, None),
        *([*eight_words(lambda n: None, reason), FINAL_USAGE] for reason in NO_REASONS),
        eight_words(lambda n: {"prompt_tokens": 5, "completion_tokens": n}, "stop", "stop"),
    ],
    ids=["counting up", "one behind", "zeros", "no numbers", "floats", *map(repr, NO_REASONS), "always stop"],
)
@pytest.mark.parametrize(
    "content_type",
    ["text/event-stream", "Text/Event-Stream; Charset=UTF-8", "application/json, text/event-stream"],
)
def test_an_answer_ends_with_its_last_event_and_the_last_count_holds(
    events: list[dict[str, Any]], content_type: str
) -> None:
    head = f"HTTP/1.1 200 OK\r\ncontent-type: {content_type}\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
    pieces = [event(item) for item in events]
    seen: list[int] = []
    answer = Answer(PLAN, 0.0, on_ended=lambda answer: seen.append(len(answer.chunk_s)))
    ask(
        scripted(head, *pieces, event("[DONE] "), END, wait_s=0.001),
        answers=[answer],
        dialect="openai",
    )
    assert answer.error is None
    assert seen == [8], "the user asks again when all of it is there"
    assert (answer.num_prompt_tokens, answer.num_output_tokens, len(answer.chunk_s)) == (5, 8, 8)
    assert answer.finish_s is not None
    assert answer.finish_s >= answer.chunk_s[-1]


@pytest.mark.parametrize("count", [0, 1])
def test_a_count_that_cannot_be_true_of_what_was_streamed_is_an_error(count: int) -> None:
    events = eight_words(lambda n: {"prompt_tokens": 5, "completion_tokens": count}, None)
    (answer,), _ = ask(scripted(STREAM_HEAD, *(event(item) for item in events), event("[DONE]"), END))
    assert answer.error == f"the server counted {count} tokens, but streamed 8 pieces of text"


@pytest.mark.parametrize(
    ("count", "error"), [(1, None), (32, "the server counted 32 tokens, but streamed no text")]
)
def test_an_answer_without_text_has_one_token_at_most(count: int, error: str | None) -> None:
    end = {"choices": [{"index": 0, "text": "", "finish_reason": "stop"}]}
    usage = {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": count}}
    (answer,), _ = ask(scripted(STREAM_HEAD, event(end), event(usage), event("[DONE]"), END))
    assert answer.error == error


@pytest.mark.parametrize("name", ["content", "reasoning_content", "reasoning"])
def test_tokens_of_a_chat_are_stamped_under_whatever_name_they_come(name: str) -> None:
    pieces = [{"choices": [{"index": 0, "delta": {"content": None, name: " w"}}]}] * 8
    end = {"choices": [{"index": 0, "delta": {}, "finish_reason": "length"}]}
    events = [*pieces, end, FINAL_USAGE, "[DONE]"]
    (answer,), _ = ask(scripted(STREAM_HEAD, *map(event, events), END), dialect="openai")
    assert (answer.error, len(answer.chunk_s)) == (None, 8)


def test_an_answer_that_goes_on_after_its_reason_ends_where_its_text_does() -> None:
    events = eight_words(lambda n: {"prompt_tokens": 5, "completion_tokens": n}, None)[:-1]
    events[2]["choices"][0]["finish_reason"] = "length"
    answering = scripted(STREAM_HEAD, *map(event, [*events, "[DONE]"]), END, wait_s=0.001)
    (answer,), _ = ask(answering, dialect="openai")
    assert (answer.error, len(answer.chunk_s), answer.finish_s) == (None, 8, answer.chunk_s[-1])


def test_what_follows_the_end_of_an_answer_changes_nothing() -> None:
    done = [*eight_words(lambda n: {"prompt_tokens": 5, "completion_tokens": n}, None), "[DONE]"]
    (answer,), _ = ask(scripted(STREAM_HEAD, *map(event, [*done, *done]), END), dialect="openai")
    assert (answer.error, len(answer.chunk_s), answer.text) == (None, 8, [" w"] * 8)


def test_what_stands_beside_the_events_does_not_harm_a_whole_answer() -> None:
    noise = chunk(b'id: 7\nretry: 5\n: ping\nx-field: 1\n{"error": "late"}\n\n')
    (answer,), _ = ask(scripted(STREAM_HEAD, event({"choices": [entry(0, [1], 1)]}), noise, END))
    assert answer.error is None


@pytest.mark.parametrize(
    ("token_ids_of", "is_chat", "is_asked"),
    [
        (("completions", "chat"), False, True),
        (("completions", "chat"), True, True),
        (("completions",), True, False),
        ((), False, False),
    ],
)
def test_ids_are_asked_for_where_the_server_is_known_to_take_it(
    token_ids_of: tuple[Call, ...], is_chat: bool, is_asked: bool
) -> None:
    target = Target(Origin("h", 1), "/v1/completions", "openai", "m", token_ids_of=token_ids_of)
    body = json.loads(target.body([replace(PLAN, is_chat=is_chat)]))
    assert body.get("return_token_ids", False) is is_asked


@pytest.mark.parametrize(
    ("name", "first", "later"),
    [
        ("token_ids", {"text": "a b"}, {"text": ""}),
        ("token_ids", {"delta": {"role": "assistant", "content": "a b"}}, {"delta": {}}),
        ("response_token_ids", {"text": "a b"}, {"text": ""}),
    ],
    ids=["vLLM", "vLLM's chat", "SGLang"],
)
def test_ids_of_a_foreign_server_count_the_tokens_of_its_chunks(
    name: str, first: dict[str, Any], later: dict[str, Any]
) -> None:
    choices = [
        {"index": 0, **first, name: [11, 12], "prompt_token_ids": [1, 2, 3], "finish_reason": None},
        {"index": 0, **later, name: [13], "finish_reason": None},  # half a character: no text yet
        {"index": 0, **first, name: [14], "finish_reason": "length"},
    ]
    usage = {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 4}}
    events = [event({"choices": [choice]}) for choice in choices]
    (answer,), server = ask(
        scripted(STREAM_HEAD, *events, event(usage), event("[DONE]"), END),
        dialect="openai",
        token_ids_of=("completions",),
    )
    assert (answer.error, answer.chunk_tokens, answer.token_ids) == (None, [2, 1, 1], [11, 12, 13, 14])
    assert (answer.num_prompt_tokens, answer.num_output_tokens) == (3, 4)
    assert answer.output_sha256 == hashlib.sha256(b"11,12,13,14").hexdigest()
    assert json.loads(server.bodies[0])["return_token_ids"] is True


HALF = "\ud83d"
LABELS = ReplayLabels("run", "continuous", "continuous", "null", "m", 0)


@pytest.mark.parametrize(
    ("choice", "beside"),
    [
        ({"text": 5}, {}),
        ({"text": ["a"]}, {}),
        ({"text": "", "delta": {"content": [{"type": "text", "text": "a"}]}}, {}),
        ({"token_ids": "ab"}, {}),
        ({"token_ids": 5}, {}),
        ({"token_ids": [1, "a"]}, {}),
        ({"token_ids": [2**40]}, {}),
        ({"token_ids": [1.5]}, {}),
        ({"finish_reason": HALF}, {}),
        ({"index": None}, {}),
        ({"timings": "x"}, {}),
        ({"timings": [1]}, {}),
        ({"timings": {"queue_s": "x", "decode_s": [1], "num_steps": 1e50, "mean_batch_size": HALF}}, {}),
        ({"num_output_tokens": 2**70}, {}),
        ({"num_prompt_tokens": 2**31}, {}),
        ({}, {"id": 7}),
        ({}, {"id": {"a": 1}}),
        ({}, {"id": HALF}),
        ({}, {"error": HALF}),
        ({}, {"error": {"message": ["x"], "code": 5}}),
        ({}, {"usage": {"prompt_tokens": 10**30, "completion_tokens": 2**33}}),
    ],
)
def test_whatever_a_server_sends_becomes_a_row(choice: dict[str, Any], beside: dict[str, Any]) -> None:
    piece = {"choices": [{**entry(0, [1], 1), **choice}], **beside}
    (answer,), _ = ask(scripted(STREAM_HEAD, event(piece), event("[DONE]"), END))
    assert answer.is_complete
    table = make_table([make_row(LABELS, answer)])
    assert table["error"].to_pylist() == [answer.error]


def test_a_character_cut_into_two_events_is_read() -> None:
    halves = [rf'{{"choices": [{{"index": 0, "text": "\u{half}"}}]}}' for half in ("d83d", "de00")]
    last = event({"choices": [entry(0, [1, 2], 2, text="")]})
    (answer,), _ = ask(scripted(STREAM_HEAD, *map(event, halves), last, event("[DONE]"), END))
    assert answer.error is None
    assert answer.text_sha256 is not None
