"""Requests that cannot be answered: the right status, the field's name, and a service that goes on."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from services.contract.checks import MAX_BODY_BYTES
from services.contract.responses import ErrorBody
from services.http import handler as intake
from tests.services.served import DEADLINE_S, Served, serving

MAX_MODEL_LEN = 64

_NOT_INTS: tuple[Any, ...] = ("5", True, 1.0, [1.5], {}, ["7"], [True])
_NOT_NUMBERS: tuple[Any, ...] = ("0.5", True, [], {}, "NaN")
_NOT_BOOLS: tuple[Any, ...] = ("true", 1, 0, [], "yes")

_BAD_VALUES: dict[str, tuple[Any, ...]] = {
    "prompt": ("", [], [[]], [""], ["a", ""], 5, 1.5, True, {}, ["a", 1], [1, "a"], [[1], "a"]),
    "prompt list": ([1.0], [True], [None], [[None]], ["a", None], ["a", []], [-1], [[1], [-2]], [257]),
    "prompt lists": ([[1], [100_000]], ["a"] * 257, [[[1]]], "x" * 1_000_001, [[1.5]], [{}]),
    "prompts": ("", [], 5, ["a", 1]),
    "max_tokens": (*_NOT_INTS, 0, -1, [], [0], [1, 2], 10**7, 10**30, "", [1] * 300),
    "max_new_tokens": (*_NOT_INTS, 0, -5),
    "seed": (*_NOT_INTS, -2, [-1], 2**63, [1, 2], []),
    "temperature": (*_NOT_NUMBERS, -0.1, 2.1, -1, 1e300),
    "top_p": (*_NOT_NUMBERS, 0, -0.5, 1.01),
    "top_k": ("5", True, 1.5, -1.0, -2, [], 10**9),
    "priority": ("1", True, 1.0, -1, 3, []),
    "stop": (5, True, {}, [1], [""], "", ["a"] * 17, "x" * 257, [None]),
    "stream": _NOT_BOOLS,
    "ignore_eos": _NOT_BOOLS,
    "stream_options": ("x", 1, [], {"include_usage": 1}, {"other": True}, {"include_usage": "true"}),
    "request_id": ("", 5, "a b", "a\nb", "x" * 129, "\u00e9", []),
    "timeout_s": ("1", True, 0, -1, 1e9, []),
    "model": (5, "", [], True),
    "n": (0, 129, "2", 1.5, True),
    "best_of": (2, "x", True, 1.0),
    "echo": ("yes", 2, 1),
    "logprobs": (0, 1, True, 5),
    "suffix": ("x", 1),
    "frequency_penalty": (2.1, -2.1, "0", True),
    "presence_penalty": (3, "x", []),
    "logit_bias": ({"5": 1}, [1], "x"),
    "min_tokens": (-1, "1", False, 0.5, 1_000_001),
    "min_p": (1.1, -0.1, "x", True),
    "repetition_penalty": (0, 1e-300, -1, 101, "x"),
    "response_format": ({"type": "json_object"}, "text"),
}
_UNKNOWN = (
    "foo",
    "maxtokens",
    "Prompt",
    "temprature",
    "",
    "prompt ",
    "__class__",
    "\u2028",
    "best-of",
    "tools",
)

_BAD_FIELDS = [(name.split()[0], value) for name, values in _BAD_VALUES.items() for value in values]
_BAD_JSON = (
    *(b"", b" ", b"{", b'{"prompt": "a"', b'{"prompt": "a",}', b"{'prompt': 'a'}", b'{"prompt": NaN}'),
    *(b'{"prompt": "a", "temperature": Infinity}', b'{"prompt": "\xff"}', b'{"prompt": "\\ud800"}', b"nul"),
    *(b'{"prompt": "a"} {}', b"[" * 100_000, b'{"a":' * 50_000, b"prompt=a", b"\x00", b"--x\r\n\r\nform"),
)
_NOT_OBJECTS = (b"[]", b"null", b'"a"', b"5", b"true", b'["prompt"]', b"[{}]")


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving(MAX_MODEL_LEN=MAX_MODEL_LEN) as served:
        yield served


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=served.url, timeout=DEADLINE_S) as client:
        yield client
        good = client.post("/generate", json={"prompt": "a", "max_tokens": 2})
        assert good.status_code == 200
        health = served.get("/health").json()
        health.pop("gpu_utilization")
        assert health == {
            "status": "ok",
            "active_requests": 0,
            "queue_depth": 0,
            "worker": "in_process",
        }


def refused(answer: httpx.Response, status: int) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    error = ErrorBody.model_validate(answer.json(), strict=True).error
    assert error.message.endswith(".")
    return error.model_dump()


def test_there_are_two_hundred_of_a_dozen_kinds() -> None:
    assert len(_BAD_FIELDS) + len(_BAD_JSON) + len(_NOT_OBJECTS) + len(_UNKNOWN) >= 200
    assert len(_BAD_VALUES) >= 12


@pytest.mark.parametrize("path", ["/generate", "/v1/completions"])
def test_bad_fields(client: httpx.Client, path: str) -> None:
    for name, value in _BAD_FIELDS:
        fields = {name: value} if name in ("prompt", "prompts") else {"prompt": "a", name: value}
        error = refused(client.post(path, content=json.dumps(fields)), 422)
        field = {"prompts": "prompt", "max_new_tokens": "max_tokens"}.get(name, name)
        assert error["param"].split(".")[0] == field, (name, value, error)
        assert field in error["message"], (name, value, error)


def test_unknown_fields_are_named(client: httpx.Client) -> None:
    for name in _UNKNOWN:
        error = refused(client.post("/generate", json={"prompt": "a", name: 1}), 422)
        assert (error["param"], error["code"]) == (name, "unknown_field")
        assert error["message"].startswith(name)
        left_out = client.post("/generate", json={"prompt": "a", "max_tokens": 1, name: None})
        assert left_out.status_code == 200, left_out.text


@pytest.mark.parametrize(
    "fields",
    [
        {"max_tokens": 3, "max_completion_tokens": 3, "max_new_tokens": 3},
        {"max_tokens": 3, "top_k": -1, "seed": -1},
        {"max_tokens": 3, "max_completion_tokens": None, "stream_options": {"include_usage": None}},
        {
            "max_tokens": 3,
            "response_format": {"type": "text", "json_schema": None},
            "logit_bias": {"1": None},
        },
    ],
)
def test_what_standard_clients_send_is_taken(client: httpx.Client, fields: dict[str, Any]) -> None:
    answer = client.post("/v1/completions", json={"prompt": "a", "ignore_eos": True} | fields)
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["completion_tokens"] == 3


def test_messages_are_taken_back_as_a_client_dumps_them(client: httpx.Client) -> None:
    nulls = dict.fromkeys(("refusal", "tool_calls", "function_call", "audio", "annotations", "name"))
    messages = [
        {"role": "user", "content": "h"},
        {"role": "assistant", "content": "a"} | nulls,
        {"role": "assistant", "content": "b", "tool_calls": [], "annotations": []},
        {
            "role": "user",
            "content": [{"type": "text", "text": "c", "cache_control": {"type": "ephemeral"}}],
        },
    ]
    answer = client.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 2})
    assert answer.status_code == 200, answer.text
    messages[1]["tool_calls"] = [{"id": "x"}]
    error = refused(client.post("/v1/chat/completions", json={"messages": messages}), 422)
    assert "tool_calls" in error["message"]


@pytest.mark.parametrize(
    "message",
    [
        {"role": "assistant", "content": None, "tool_calls": []},
        {"role": "assistant", "content": "a", "images": [], "audio": {}, "function_call": {"name": None}},
        {"role": "assistant", "content": "a", "provider_specific_fields": {"refusal": None, "blocks": []}},
        {"role": "assistant", "content": [{"type": "text", "text": "a", "annotations": [], "id": None}]},
        {"role": "user", "content": "a", "cache_control": {"type": "ephemeral"}},
    ],
)
def test_what_says_nothing_in_a_message_counts_as_left_out(
    client: httpx.Client, message: dict[str, Any]
) -> None:
    answer = client.post("/v1/chat/completions", json={"messages": [message], "max_tokens": 2})
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": []}])
def test_a_user_who_says_nothing_is_refused(client: httpx.Client, content: dict[str, Any]) -> None:
    body = {"messages": [{"role": "user", **content}]}
    assert refused(client.post("/v1/chat/completions", json=body), 422)["param"] == "messages.0.content"


def test_bad_json(client: httpx.Client) -> None:
    for body in _BAD_JSON:
        assert refused(client.post("/generate", content=body), 400)["code"] == "invalid_json", body
    for body in _NOT_OBJECTS:
        assert "JSON object" in refused(client.post("/generate", content=body), 422)["message"], body


@pytest.mark.parametrize("fields", [{}, {"max_tokens": 3}, {"prompt": None}, {"prompts": None}])
def test_a_missing_prompt_is_named(client: httpx.Client, fields: dict[str, Any]) -> None:
    error = refused(client.post("/generate", json=fields), 422)
    assert (error["param"], error["code"]) == ("prompt", "missing_field")


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": "a", "prompts": "b"},
        {"prompt": "a", "max_tokens": 1, "max_new_tokens": 2},
        {"prompt": ["a", "b"], "max_tokens": [1]},
        {"prompt": ["a", "b"], "seed": [1, 2, 3]},
    ],
)
def test_fields_that_contradict(client: httpx.Client, fields: dict[str, Any]) -> None:
    error = refused(client.post("/generate", json=fields), 422)
    assert error["param"] in fields
    assert error["param"] in error["message"]


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": "a", "max_tokens": MAX_MODEL_LEN},
        {"prompt": "a" * MAX_MODEL_LEN},
        {"prompt": ["a", "a" * 60], "max_tokens": [1, 5]},
        {"prompt": [1] * 60, "max_tokens": 5},
        {"prompt": "a" * 100_000, "max_tokens": 1},
    ],
)
def test_what_can_never_fit(client: httpx.Client, fields: dict[str, Any]) -> None:
    error = refused(client.post("/generate", json=fields), 400)
    assert (error["param"], error["code"]) == ("prompt", "context_length_exceeded")
    assert str(MAX_MODEL_LEN) in error["message"]


def test_a_body_that_is_too_large(client: httpx.Client) -> None:
    body = b'{"prompt": "' + b"a" * MAX_BODY_BYTES + b'"}'
    assert refused(client.post("/generate", content=body), 413)["code"] == "body_too_large"
    pieces = (body[i : i + 65_536] for i in range(0, len(body), 65_536))
    assert refused(client.post("/generate", content=pieces), 413)["code"] == "body_too_large"


def test_no_such_route(client: httpx.Client) -> None:
    assert "/nothing" in refused(client.get("/nothing"), 404)["message"]
    answer = client.get("/generate")
    assert refused(answer, 405)["code"] == "method_not_allowed"
    assert answer.headers["allow"] == "POST"
    assert refused(client.get("/steps?after=x"), 422)["param"] == "after"


def test_another_model(client: httpx.Client) -> None:
    error = refused(client.post("/generate", json={"prompt": "a", "model": "other"}), 404)
    assert (error["param"], error["code"]) == ("model", "model_not_found")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "x"}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": "x"}], "tools": [{}]}, "tools"),
        ({"messages": [{"role": "user", "content": "x"}], "logprobs": True}, "logprobs"),
        ({"messages": [{"role": "user", "content": "x"}], "logprobs": 0}, "logprobs"),
        ({"messages": [{"role": "user", "content": "x"}], "top_logprobs": False}, "top_logprobs"),
        ({"messages": [{"role": "user", "content": "x"}], "prompt": "x"}, "prompt"),
    ],
)
def test_bad_chats(client: httpx.Client, fields: dict[str, Any], param: str) -> None:
    error = refused(client.post("/v1/chat/completions", json=fields), 422)
    assert error["param"] == param
    assert param in error["message"]


def test_a_body_that_does_not_come(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intake, "BODY_TIMEOUT_S", 0.2)
    with socket.create_connection(("127.0.0.1", served.port), timeout=DEADLINE_S) as connection:
        connection.sendall(b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: 50\r\n\r\n{")
        assert connection.recv(65_536).startswith(b"HTTP/1.1 408 ")
