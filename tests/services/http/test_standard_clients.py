"""What the clients of other servers send and how they connect, over real sockets."""

from __future__ import annotations

import gzip
import json
import socket
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from services.contract.responses import Completion, Version
from services.contract.status import ModelEntry
from services.contract.tokens import Detokenized, Tokens
from tests.services.served import CLIENT, DEADLINE_S, Served, events, serving, stream, until

EOS = 256


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving(MAX_BATCH=4, MAX_MODEL_LEN=700) as served:
        yield served


def answer_of(served: Served, path: str = "/v1/completions", **fields: Any) -> dict[str, Any]:
    answer = served.post(path, **fields)
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    return body


def refused(answer: httpx.Response, status: int, word: str) -> None:
    assert answer.status_code == status, answer.text
    assert word in answer.json()["error"]["message"]


# -- fields ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_usage_so_far_on_every_chunk(served: Served, path: str) -> None:
    prompt = (
        {"prompt": "abc"} if path == "/v1/completions" else {"messages": [{"role": "u", "content": "abc"}]}
    )
    options = {"include_usage": True, "continuous_usage_stats": True}
    fields = {
        **prompt,
        "max_tokens": 6,
        "ignore_eos": True,
        "n": 2,
        "stream": True,
        "stream_options": options,
    }
    frames = events(CLIENT.post(served.url + path, json=fields).text)
    counts = [frame["usage"]["completion_tokens"] for frame in frames[:-1]]
    sent = [sum(len(choice["token_ids"]) for choice in frame["choices"]) for frame in frames[:-1]]
    assert counts == [sum(sent[: at + 1]) for at in range(len(sent))]
    assert counts[-1] == 12
    assert len({frame["usage"]["prompt_tokens"] for frame in frames[:-1]}) == 1


def test_without_usage_continuous_usage_changes_nothing(served: Served) -> None:
    fields = {"prompt": "abc", "max_tokens": 3, "ignore_eos": True}
    frames = stream(served.url, **fields, stream_options={"continuous_usage_stats": True})
    assert all("usage" not in frame for frame in frames[:-1])


def test_min_tokens_keeps_an_answer_from_ending(served: Served) -> None:
    prompts = [f"prompt {number}" for number in range(12)]
    free = answer_of(served, prompt=prompts, max_tokens=600)["choices"]
    short = [choice for choice in free if choice["num_output_tokens"] < 300]
    assert short, "some answers of the null backend end early"
    kept = answer_of(served, prompt=prompts, max_tokens=600, min_tokens=300)["choices"]
    assert all(choice["num_output_tokens"] >= 300 for choice in kept)
    for before, after in zip(free, kept, strict=True):
        assert EOS not in after["token_ids"][:299]
        if before["num_output_tokens"] >= 300:
            assert after["token_ids"] == before["token_ids"]
        else:
            assert after["token_ids"][: before["num_output_tokens"] - 1] == before["token_ids"][:-1]


def test_stop_token_ids_end_an_answer_and_have_no_text(served: Served) -> None:
    fields = {"prompt": "abc", "max_tokens": 100, "ignore_eos": True}
    token_ids = answer_of(served, **fields)["choices"][0]["token_ids"]
    at = 20
    stop = token_ids[at]
    begin = token_ids.index(stop)
    (choice,) = answer_of(served, **fields, stop_token_ids=[stop])["choices"]
    assert (choice["finish_reason"], choice["token_ids"]) == ("stop", token_ids[: begin + 1])
    assert choice["text"] == bytes(token_ids[:begin]).decode()
    (choice,) = answer_of(served, **fields, stop_token_ids=[stop], min_tokens=30)["choices"]
    assert choice["num_output_tokens"] >= 30
    assert stop not in choice["token_ids"][:29]


def test_a_stop_string_is_looked_for_from_min_tokens_on(served: Served) -> None:
    fields = {"prompt": "abc", "max_tokens": 400, "ignore_eos": True}
    text = answer_of(served, **fields)["choices"][0]["text"]
    (choice,) = answer_of(served, **fields, stop="e", min_tokens=50)["choices"]
    assert choice["text"] == text[: text.index("e", 49)]


def test_what_cannot_be_is_named(served: Served) -> None:
    for fields, word in (
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens"),
        ({"stop_token_ids": [EOS + 1]}, "stop_token_ids"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"stop_token_ids": list(range(200))}, "stop_token_ids"),
        ({"stop_token_ids": "a"}, "stop_token_ids"),
        ({"logprobs": 0}, "logprobs"),
        ({"include_stop_str_in_output": True}, "include_stop_str_in_output"),
        ({"skip_special_tokens": 1}, "skip_special_tokens"),
    ):
        refused(served.post("/v1/completions", prompt="a", **fields), 422, word)
    chat = {"messages": [{"role": "user", "content": "a"}]}
    for fields, word in (
        ({"add_generation_prompt": False}, "add_generation_prompt"),
        ({"continue_final_message": True}, "continue_final_message"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        ({"add_special_tokens": True}, "add_special_tokens"),
    ):
        refused(served.post("/v1/chat/completions", **chat, **fields), 422, word)


def test_prompt_token_ids_come_back_once(served: Served) -> None:
    asked = {"max_tokens": 4, "ignore_eos": True, "return_token_ids": True}
    body = answer_of(served, prompt=["ab", "c"], **asked)
    Completion.model_validate(body, strict=True)
    assert [choice["prompt_token_ids"] for choice in body["choices"]] == [[97, 98], [99]]
    frames = stream(served.url, prompt="ab", **asked)
    seen = [frame["choices"][0].get("prompt_token_ids") for frame in frames[:-1]]
    assert seen == [[97, 98]] + [None] * (len(seen) - 1)
    chat = {"messages": [{"role": "user", "content": "a"}], **asked}
    ids = list(b"user: a\nassistant: ")
    assert answer_of(served, "/v1/chat/completions", **chat)["prompt_token_ids"] == ids
    frames = events(CLIENT.post(served.url + "/v1/chat/completions", json={**chat, "stream": True}).text)
    seen = [frame.get("prompt_token_ids") for frame in frames[:-1]]
    assert seen == [ids] + [None] * (len(seen) - 1)
    assert "prompt_token_ids" not in json.dumps(answer_of(served, prompt="ab", max_tokens=2))


# -- paths ----------------------------------------------------------------------------------------


def test_tokenize_and_back(served: Served) -> None:
    tokens = Tokens.model_validate(answer_of(served, "/tokenize", prompt="häh"), strict=True)
    assert (tokens.count, tokens.max_model_len, tokens.tokens) == (4, 700, list("häh".encode()))
    text = answer_of(served, "/detokenize", tokens=tokens.tokens)
    assert Detokenized.model_validate(text).prompt == "häh"
    chat = answer_of(served, "/tokenize", messages=[{"role": "user", "content": "a"}])
    assert chat["tokens"] == list(b"user: a\nassistant: ")
    for more in ({}, {"messages": None}, {"user": "messages"}):
        assert answer_of(served, "/tokenize", prompt="messages", **more)["count"] == len("messages")
    refused(served.post("/tokenize", prompt=["a", "b"]), 422, "prompt")
    refused(served.post("/detokenize", tokens=[999]), 422, "tokens")
    refused(served.post("/tokenize", prompt="a", model="other"), 404, "other")


def test_version_and_one_model(served: Served) -> None:
    Version.model_validate(served.get("/version").json(), strict=True)
    assert ModelEntry.model_validate(served.get("/v1/models/null").json(), strict=True).id == "null"
    refused(served.get("/v1/models/some/other"), 404, "some/other")


def test_a_request_whose_id_holds_a_slash_can_be_cancelled(served: Served) -> None:
    answers: list[httpx.Response] = []
    with serving(NULL_STEP_MS=20) as slow:
        fields = {"prompt": "a", "max_tokens": 3000, "ignore_eos": True, "request_id": "run/1/a"}
        asking = threading.Thread(target=lambda: answers.append(slow.post(**fields)))
        asking.start()
        until(lambda: slow.get("/health").json()["active_requests"] == 1)
        assert CLIENT.delete(slow.url + "/requests/run/1/a").json() == {
            "request_id": "run/1/a",
            "num_prompts": 1,
        }
        asking.join(DEADLINE_S)
    assert answers[0].json()["choices"][0]["finish_reason"] == "abort"


# -- connections ----------------------------------------------------------------------------------


def test_a_compressed_body_is_refused(served: Served) -> None:
    body = gzip.compress(b'{"prompt": "a"}')
    for path in ("/v1/completions", "/v1/generate", "/tokenize"):
        answer = CLIENT.post(served.url + path, content=body, headers={"Content-Encoding": "gzip"})
        refused(answer, 415, "gzip")
    plain = CLIENT.post(
        served.url + "/generate", content=b'{"prompt": "a"}', headers={"Content-Encoding": "identity"}
    )
    assert plain.status_code == 200


@pytest.mark.parametrize("second", ["gzip", "identity, gzip"])
def test_a_second_content_encoding_is_seen(served: Served, second: str) -> None:
    head = (
        f"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Encoding: identity\r\nContent-Encoding: {second}\r\n"
    )
    with socket.create_connection(("127.0.0.1", served.port), timeout=20) as client:
        client.sendall(head.encode() + b"Content-Length: 2\r\n\r\n{}")
        assert client.recv(100).startswith(b"HTTP/1.1 415")


def test_nothing_is_redirected(served: Served) -> None:
    for path in ("/v1/completions/", "//v1/completions", "/health/"):
        answer = CLIENT.get(served.url + path, headers={"Host": "evil.example"})
        assert (answer.status_code, answer.headers.get("location")) == (404, None)


def talk(served: Served, request: bytes, *, half_close: bool = False) -> bytes:
    """Everything that comes back until the service closes."""
    with socket.create_connection(("127.0.0.1", served.port), timeout=DEADLINE_S) as connection:
        connection.sendall(request)
        if half_close:
            connection.shutdown(socket.SHUT_WR)
        received = b""
        while piece := connection.recv(65536):
            received += piece
        return received


def post_bytes(version: str = "1.1", **fields: Any) -> bytes:
    body = json.dumps({"prompt": "abc", "ignore_eos": True, **fields}).encode()
    head = f"POST /v1/completions HTTP/{version}\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


@pytest.mark.parametrize("path", ["streamed", "whole"])
def test_http_1_0_gets_no_chunks(served: Served, path: str) -> None:
    head, _, body = talk(served, post_bytes("1.0", max_tokens=5, stream=path == "streamed")).partition(
        b"\r\n\r\n"
    )
    assert b"200 OK" in head.split(b"\r\n")[0]
    assert b"transfer-encoding" not in head.lower()
    if path == "streamed":
        assert events(body.decode())[-1] == "[DONE]"
    else:
        assert json.loads(body)["usage"]["completion_tokens"] == 5


@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_a_client_that_shuts_its_sending_side_gets_its_answer(version: str, streamed: bool) -> None:
    with serving(MAX_BATCH=4, MAX_MODEL_LEN=700, NULL_STEP_MS=20) as served:
        request = post_bytes(version, max_tokens=50, stream=streamed)  # takes longer than a probe
        received = talk(served, request, half_close=True)
        assert b"200 OK" in received
        assert received.endswith(b"[DONE]\n\n" + b"\r\n0\r\n\r\n" * (version == "1.1")) or not streamed
        assert b'"finish_reason":"length"' in received


@pytest.mark.parametrize("streamed", [True, False])
def test_a_client_that_left_is_noticed_all_the_same(streamed: bool) -> None:
    with serving(MAX_BATCH=4, MAX_MODEL_LEN=4000, NULL_STEP_MS=20) as served:
        with socket.create_connection(("127.0.0.1", served.port)) as connection:
            connection.sendall(post_bytes(max_tokens=3000, stream=streamed))
            until(lambda: served.get("/health").json()["active_requests"] == 1)
        until(lambda: served.get("/health").json()["active_requests"] == 0, 5.0)


def test_half_a_request_is_not_waited_for(served: Served) -> None:
    assert talk(served, post_bytes(max_tokens=5)[:-3], half_close=True) == b""
