"""What a request may hold, and that hand-written frames are what the models say."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from harness.results.record import SCHEMA
from harness.results.steps import STEP_SCHEMA
from services.contract.requests import GenerateRequest
from services.contract.responses import ChatCompletion, Completion, StreamChunk, Timings, Usage
from services.contract.status import StepLine
from services.contract.timings import SequenceTimings, StepRecord
from services.core.body import parse
from services.core.outputs import ChoiceOutput
from services.core.step_log import StepLog
from services.errors import ApiError
from services.http.sse import FrameWriter, Shape

TIMINGS = SequenceTimings(0.001, 0.0, 0.25, 1e-07, 3, 1.5)
FINISH = ("length", 7, 3, TIMINGS)


def read(fields: dict[str, Any]) -> GenerateRequest:
    return parse(GenerateRequest, json.dumps(fields).encode())


@pytest.mark.parametrize(
    ("sent", "prompts"),
    [
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
    ],
)
@pytest.mark.parametrize("name", ["prompt", "prompts"])
def test_every_form_of_prompt_is_a_list_of_prompts(name: str, sent: Any, prompts: list[Any]) -> None:
    assert read({name: sent}).prompt == prompts


HI = {"role": "user", "content": "Hi"}
CHAT = [HI, {"role": "assistant", "content": "Hello!"}, {"role": "user", "content": "Bye"}]


@pytest.mark.parametrize(("sent", "chats"), [(CHAT, [CHAT]), ([CHAT, [HI]], [CHAT, [HI]])])
def test_messages_take_the_place_of_prompts(sent: Any, chats: list[Any]) -> None:
    request = read({"messages": sent})
    assert [
        [message.model_dump(exclude_unset=True) for message in chat] for chat in request.messages
    ] == chats
    assert request.num_prompts == len(chats)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "prompt"),
        ({"prompt": "a", "messages": [HI]}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": [[]]}, "messages.0"),
        ({"messages": [[HI], HI]}, "messages.1"),
        ({"messages": [{"role": "user"}]}, "messages.0.0.content"),
        ({"messages": [HI] * 1025}, "messages.0"),
        ({"messages": [[HI]] * 257}, "messages"),
        ({"messages": "Hi"}, "messages"),
        ({"messages": [HI], "echo": True}, "echo"),
    ],
)
def test_messages_that_are_none_are_refused_by_name(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as refused:
        read(fields)
    assert (refused.value.status, refused.value.param) == (422, param)


def test_defaults() -> None:
    request = read({"prompt": "a"})
    assert (request.stream, request.ignore_eos, request.priority, request.stop) == (False, False, 1, ())
    assert (request.max_tokens, request.temperature, request.seed) == (None, None, None)


@pytest.mark.parametrize("name", sorted(set(GenerateRequest.model_fields) - {"prompt"}))
def test_null_counts_as_left_out(name: str) -> None:
    assert read({"prompt": "a", name: None}) == read({"prompt": "a"})


@pytest.mark.parametrize(
    "fields",
    [
        {"max_tokens": [5, 6]},
        {"temperature": 1},
        {"temperature": 0.5, "top_p": 1, "top_k": 5, "seed": 2**63 - 1},
        {"user": "me", "metadata": {"a": 1}, "store": True, "service_tier": "auto"},
        {"n": 1, "best_of": 1, "echo": False, "suffix": "", "logit_bias": {}, "frequency_penalty": 0.0},
        {"response_format": {"type": "text"}, "min_tokens": 0, "repetition_penalty": 1.0},
        {"stream": True, "stream_options": {"include_usage": True, "include_obfuscation": False}},
        {"timeout_s": 5, "request_id": "r-1"},
    ],
)
def test_what_is_accepted(fields: dict[str, Any]) -> None:
    request = read({"prompt": ["a", "b"], **fields})
    assert request.model_fields_set == {"prompt", *fields}
    for name, value in fields.items():
        assert request.model_dump(exclude_unset=True)[name] == value


def test_other_spellings() -> None:
    assert read({"prompt": "a", "max_new_tokens": 5}).max_tokens == 5
    assert read({"prompt": "a", "stop": "x"}).stop == ("x",)
    assert read({"prompt": "a", "stop": ["x", "y"]}).stop == ("x", "y")


def test_a_request_does_not_change() -> None:
    with pytest.raises(ValueError, match="frozen"):
        read({"prompt": "a"}).priority = 2


def test_the_message_names_each_bad_field() -> None:
    with pytest.raises(ApiError) as error:
        read({"prompt": "a", "temperature": "hot", "top_p": 2, "colour": 1})
    assert error.value.param == "temperature"
    for name in ("temperature", "top_p", "colour"):
        assert name in error.value.message


def parsed(frame: bytes) -> Any:
    assert frame.startswith(b"data: ")
    assert frame.endswith(b"\n\n")
    return json.loads(frame.removeprefix(b"data: "))


@given(st.text(), st.lists(st.integers(0, 2**31)), st.booleans())
def test_frames_parse_to_the_model(text: str, token_ids: list[int], is_last: bool) -> None:
    writer = FrameWriter("completions", "r-1", 5, 'a"b')
    frame = writer.frame(
        [ChoiceOutput(0, text, token_ids, *(FINISH if is_last else ())), ChoiceOutput(3, "x", [1])]
    )
    assert frame.isascii()
    assert frame.count(b"\n") == 2
    chunk = StreamChunk.model_validate(parsed(frame), strict=True)
    assert (chunk.id, chunk.created, chunk.model) == ("r-1", 5, 'a"b')
    first, second = chunk.choices
    assert (first.index, first.text, first.token_ids) == (0, text, token_ids)
    assert first.finish_reason == ("length" if is_last else None)
    assert (second.index, second.finish_reason, second.timings) == (3, None, None)
    if is_last:
        assert first.timings is not None
        assert first.timings.model_dump() == {
            name: getattr(TIMINGS, name, None) for name in Timings.model_fields
        }
        assert (first.num_prompt_tokens, first.num_output_tokens) == (7, 3)


def test_an_entry_in_the_middle_has_no_empty_fields() -> None:
    frame = parsed(FrameWriter("completions", "r", 5, "m").frame([ChoiceOutput(0, "x", [1])]))
    assert frame["choices"] == [{"index": 0, "text": "x", "token_ids": [1], "finish_reason": None}]
    assert "usage" not in frame


def test_the_usage_frame() -> None:
    frames = FrameWriter("completions", "r", 5, "m", with_usage=True).end(
        [ChoiceOutput(i, "", [], *FINISH) for i in range(2)]
    )
    assert frames.endswith(b"data: [DONE]\n\n")
    frame = parsed(frames.removesuffix(b"data: [DONE]\n\n"))
    chunk = StreamChunk.model_validate(frame, strict=True)
    assert chunk.choices == []
    assert chunk.usage == Usage(prompt_tokens=14, completion_tokens=6, total_tokens=20)


@pytest.mark.parametrize(("shape", "model"), [("completions", Completion), ("chat", ChatCompletion)])
def test_whole_answers_parse_to_their_models(shape: Shape, model: type[BaseModel]) -> None:
    body = json.loads(
        FrameWriter(shape, "r", 5, "m").whole([ChoiceOutput(0, "\u2028\U0001f642", [1, 2, 3], *FINISH)])
    )
    answer = model.model_validate(body, strict=True)
    assert answer.model_dump(exclude_unset=True) == body


def test_chat_frames_name_the_role_once() -> None:
    writer = FrameWriter("chat", "r", 5, "m")
    deltas = [parsed(writer.frame([ChoiceOutput(0, text, [1])]))["choices"][0]["delta"] for text in "ab"]
    assert deltas == [{"role": "assistant", "content": "a"}, {"content": "b"}]


def test_every_timing_and_counter_is_on_the_wire_and_in_the_parquet_files() -> None:
    timings = [field.name for field in fields(SequenceTimings)]
    frame = parsed(FrameWriter("completions", "r", 5, "m").frame([ChoiceOutput(0, "x", [1], *FINISH)]))
    assert list(frame["choices"][0]["timings"]) == timings
    assert [name for name in SCHEMA.names if name in timings] == timings
    assert set(timings) == set(Timings.model_fields)

    counters = [field.name for field in fields(StepRecord)]
    log = StepLog()
    log.add(StepRecord(0, 1.0, 0.5, 1, 0, 1, 0, 0))
    (line,) = json.loads(log.page(0))["steps"]
    assert list(line) == counters == STEP_SCHEMA.names[2:]
    assert StepLine.model_validate(line, strict=True).model_dump() == line


@pytest.mark.parametrize(
    "body",
    [
        b'{"prompt": [' + b"[1]," * 30_000 + b"[1]]}",
        b'{"prompt": [' + b'"",' * 60_000 + b'""]}',
        b'{"prompt": [' + b"1," * 1_100_000 + b"1]}",
        b'{"prompt": [' + b"[[[[1]]]]," * 10_000 + b"[1]]}",
    ],
)
def test_more_values_than_any_request_needs_are_refused_unread(body: bytes) -> None:
    with pytest.raises(ApiError) as refused:
        parse(GenerateRequest, body)
    assert (refused.value.status, refused.value.code) == (413, "body_too_large")


def test_what_a_text_holds_does_not_count_as_values() -> None:
    text = '[{"a,": "b\\\\"}], ' * 40_000
    assert parse(GenerateRequest, json.dumps({"prompt": text}).encode()).prompt == [text]
    ids = [list(range(1000, 4000))] * 250
    assert parse(GenerateRequest, json.dumps({"prompt": ids}).encode()).prompt == ids
