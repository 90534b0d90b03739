"""Logprobs in both shapes, whole and streamed, and their refusal where the backend has none."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from adapters.base import BackendInfo
from services.contract.responses import ChatCompletion, Completion
from services.core.outputs import SpelledToken
from services.engine.messages import SequenceUpdate, StepReport
from services.engine_client.wire import pack, unpack
from services.http.sse import _TextLength
from tests.services.http.test_app import Background
from tests.services.scripted_engine import ScriptedEngine, last
from tests.services.served import Served, events, serving, until

A, B, EURO_START = ord("a"), ord("b"), 0xE2
CHAT = {"messages": [{"role": "user", "content": "x"}]}
TOKENS = [A, EURO_START, B]
LOGPROBS = [(-0.5, [(A, -0.5), (B, -1.0)]), (-2.0, [(B, -0.1)]), (-0.25, [])]
TOP = [{"a": -0.5, "b": -1.0}, {"b": -0.1}, {}]


class WithLogprobs(ScriptedEngine):
    async def start(self) -> BackendInfo:
        return replace(await super().start(), has_logprobs=True)


@pytest.fixture
def engine() -> WithLogprobs:
    return WithLogprobs()


@pytest.fixture
def served(engine: WithLogprobs) -> Iterator[Served]:
    with serving(engine) as served:
        yield served


def answered(engine: WithLogprobs, served: Served, path: str, **fields: Any) -> Background:
    """A request whose three tokens come in two steps, as they do through the pipe of an engine's process."""
    request = Background(served, path=path, **fields)
    until(lambda: len(engine.submitted) == 1)
    seq_id = engine.submitted[0].seq_id
    end = replace(last(seq_id, TOKENS[1:]), logprobs=LOGPROBS[1:])
    for update in (SequenceUpdate(seq_id, TOKENS[:1], logprobs=LOGPROBS[:1]), end):
        report = unpack(pack(StepReport([update])))
        assert isinstance(report, StepReport)
        served.call(lambda updates=report.updates: engine.step(*updates))
    return request


def test_a_completion_lists_them(engine: WithLogprobs, served: Served) -> None:
    answer = answered(engine, served, "/v1/completions", prompt="x", logprobs=2).answer()
    assert engine.submitted[0].params.num_logprobs == 2
    (choice,) = Completion.model_validate(answer.json(), strict=True).choices
    assert choice.logprobs is not None
    assert choice.logprobs.tokens == ["a", "bytes:\\xe2", "b"]
    assert choice.logprobs.token_logprobs == [-0.5, -2.0, -0.25]
    assert choice.logprobs.top_logprobs == TOP
    assert choice.logprobs.text_offset == [0, 1, 2]


def test_parts_of_characters_stay_apart_and_count_with_the_last(
    engine: WithLogprobs, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    euro, parts = "€".encode(), [EURO_START, 0x82, 0xAC]
    monkeypatch.setattr("tests.services.http.test_logprobs.TOKENS", parts)
    top = [(EURO_START, -0.5), (0xF0, -1.0), (0x82, -2.0)]
    monkeypatch.setattr("tests.services.http.test_logprobs.LOGPROBS", [(-0.5, top)] * 3)
    answer = answered(engine, served, "/v1/completions", prompt="x", logprobs=3).answer()
    (choice,) = answer.json()["choices"]
    told = choice["logprobs"]
    assert told["top_logprobs"][0] == {r"bytes:\xe2": -0.5, r"bytes:\xf0": -1.0, r"bytes:\x82": -2.0}
    assert (choice["text"], told["text_offset"]) == (euro.decode(), [0, 0, 0])


def test_a_token_that_breaks_a_character_off_and_ends_in_another_begins_after_it() -> None:
    length = _TextLength()
    tokens = [SpelledToken("", raw) for raw in (b"\xe2", b"a\xe2", b"b")]
    assert [length.add(token) for token in tokens] == [0, 1, 3]


def test_a_chat_lists_them_with_their_bytes(engine: WithLogprobs, served: Served) -> None:
    fields = {**CHAT, "logprobs": True, "top_logprobs": 2}
    answer = answered(engine, served, "/v1/chat/completions", **fields).answer()
    (choice,) = ChatCompletion.model_validate(answer.json(), strict=True).choices
    assert choice.logprobs is not None
    told = choice.logprobs.content
    assert [(t.token, t.logprob, t.bytes) for t in told] == [
        ("a", -0.5, [97]), ("bytes:\\xe2", -2.0, [0xE2]), ("b", -0.25, [98])
    ]  # fmt: skip
    assert [{t.token: t.logprob for t in one.top_logprobs} for one in told] == TOP


def test_a_stream_goes_on_counting_where_its_last_frame_ended(engine: WithLogprobs, served: Served) -> None:
    answer = answered(engine, served, "/v1/completions", prompt="x", logprobs=0, stream=True).answer()
    told = [f["choices"][0]["logprobs"] for f in events(answer.text) if f != "[DONE]"]
    assert [offset for one in told for offset in one["text_offset"]] == [0, 1, 2]
    assert [p for one in told for p in one["token_logprobs"]] == [-0.5, -2.0, -0.25]


def test_what_a_stop_string_cuts_off_has_none(engine: WithLogprobs, served: Served) -> None:
    answer = answered(engine, served, "/v1/completions", prompt="x", logprobs=0, stop="\ufffd").answer()
    (choice,) = answer.json()["choices"]
    assert len(choice["logprobs"]["tokens"]) == len(choice["token_ids"])


def test_an_answer_without_them_has_no_such_field(engine: WithLogprobs, served: Served) -> None:
    for fields in ({}, {"logprobs": False}):
        answer = answered(engine, served, "/v1/completions", prompt="x", **fields).answer()
        assert engine.submitted[0].params.num_logprobs is None
        assert "logprobs" not in answer.json()["choices"][0]
        engine.messages.clear()


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("/v1/completions", {"prompt": "x", "logprobs": 1, "echo": True}, "logprobs"),
        ("/v1/completions", {"prompt": "x", "logprobs": 21}, "logprobs"),
        ("/v1/generate", {"prompt": "x", "logprobs": 1}, "logprobs"),
        ("/v1/chat/completions", {**CHAT, "top_logprobs": 1}, "top_logprobs"),
        ("/v1/chat/completions", {**CHAT, "logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ],
)
def test_what_cannot_be_given_is_refused(
    served: Served, path: str, fields: dict[str, Any], param: str
) -> None:
    answer = served.post(path, **fields)
    assert (answer.status_code, answer.json()["error"]["param"]) == (422, param)


def test_a_backend_without_them_says_so() -> None:
    with serving(ScriptedEngine()) as served:
        for path, fields in (
            ("/v1/completions", {"prompt": "x", "logprobs": 0}),
            ("/v1/chat/completions", {**CHAT, "logprobs": True}),
        ):
            error = served.post(path, **fields).json()["error"]
            assert (error["param"], error["code"]) == ("logprobs", "unsupported_field")
            assert "backend null" in error["message"]
