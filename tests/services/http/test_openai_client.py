"""The official `openai` package, unmodified, against the service: sync, async, streams, usage, errors."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import openai
import pytest

from services.engine.messages import SequenceUpdate
from tests.services.http.test_app import Background
from tests.services.scripted_engine import ScriptedEngine, last
from tests.services.served import Served, serving, until

KEY = "not-a-real-key"


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving(MAX_BATCH=8, MAX_MODEL_LEN=500, API_KEY=KEY) as served:
        yield served


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=served.url + "/v1", api_key=KEY, max_retries=0) as client:
        yield client


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["null"]


def test_a_completion(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="null", prompt="hello", max_tokens=7, extra_body={"ignore_eos": True}, user="me"
    )
    assert answer.object == "text_completion"
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (
        5,
        7,
        12,
    )
    assert len(answer.choices[0].text) == 7


def test_a_streamed_completion_with_usage(client: openai.OpenAI) -> None:
    asked = {"model": "null", "prompt": "hello", "max_tokens": 20, "temperature": 1.0, "seed": 3}
    whole = client.completions.create(**asked)  # type: ignore[call-overload]
    chunks = list(
        client.completions.create(**asked, stream=True, stream_options={"include_usage": True})  # type: ignore[call-overload]
    )
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == whole.choices[0].text
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason


def test_chat_with_text_parts_and_a_stream(client: openai.OpenAI) -> None:
    plain = client.chat.completions.create(
        model="null", messages=[{"role": "user", "content": "hi"}], max_completion_tokens=9
    )
    parts = client.chat.completions.create(
        model="null",
        messages=[{"role": "user", "content": [{"type": "text", "text": "hi"}]}],
        max_tokens=9,
    )
    assert plain.choices[0].message.role == "assistant"
    assert parts.choices[0].message.content == plain.choices[0].message.content
    deltas = list(
        client.chat.completions.create(
            model="null", messages=[{"role": "user", "content": "hi"}], max_tokens=9, stream=True
        )
    )
    assert deltas[0].choices[0].delta.role == "assistant"
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in deltas)
    assert streamed == plain.choices[0].message.content


def test_choices_of_one_prompt_are_its_own_and_its_prompt_counts_once(client: openai.OpenAI) -> None:
    asked = {"model": "null", "max_tokens": 12, "temperature": 1.0, "seed": 3}
    answer = client.completions.create(prompt=["ab", "cde"], n=3, **asked)  # type: ignore[call-overload]
    assert [choice.index for choice in answer.choices] == list(range(6))
    assert answer.usage.prompt_tokens == 5
    assert len({choice.text for choice in answer.choices[:3]}) == 3
    alone = client.completions.create(prompt="cde", **asked)  # type: ignore[call-overload]
    assert answer.choices[3].text == alone.choices[0].text


def test_echo_begins_with_the_prompt(client: openai.OpenAI) -> None:
    asked = {"model": "null", "prompt": "hello ", "max_tokens": 5}
    plain = client.completions.create(**asked)  # type: ignore[call-overload]
    echoed = client.completions.create(**asked, echo=True)  # type: ignore[call-overload]
    assert echoed.choices[0].text == "hello " + plain.choices[0].text
    streamed = list(client.completions.create(**asked, echo=True, stream=True))  # type: ignore[call-overload]
    assert "".join(chunk.choices[0].text for chunk in streamed) == echoed.choices[0].text
    ids = client.completions.create(model="null", prompt=list(b"hello "), max_tokens=5, echo=True)
    assert ids.choices[0].text == echoed.choices[0].text


def test_the_async_client(served: Served) -> None:
    async def scenario() -> None:
        async with openai.AsyncOpenAI(base_url=served.url + "/v1", api_key=KEY, max_retries=0) as client:
            whole = await client.completions.create(model="null", prompt="x", max_tokens=9)
            text = ""
            stream = await client.completions.create(model="null", prompt="x", max_tokens=9, stream=True)
            async for chunk in stream:
                text += chunk.choices[0].text
            assert text == whole.choices[0].text
            chats = [
                client.chat.completions.create(
                    model="null", messages=[{"role": "user", "content": f"{i}"}], max_tokens=5
                )
                for i in range(20)
            ]
            assert len(await asyncio.gather(*chats)) == 20

    asyncio.run(scenario())


def test_errors_are_the_package_s_own(client: openai.OpenAI, served: Served) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="other", prompt="a")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as too_long:
        client.completions.create(model="null", prompt="a" * 600)
    assert too_long.value.code == "context_length_exceeded"
    for field, value in {"logprobs": 1, "best_of": 2, "suffix": "x", "logit_bias": {"5": 1}}.items():
        with pytest.raises(openai.UnprocessableEntityError) as refused:
            client.completions.create(model="null", prompt="a", **{field: value})  # type: ignore[call-overload]
        assert (refused.value.param, refused.value.code) == (field, "unsupported_field")
        assert field in refused.value.message
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=served.url + "/v1", api_key="wrong", max_retries=0).models.list()


def test_a_full_queue_is_retried_by_the_package_as_told() -> None:
    engine = ScriptedEngine()
    with serving(engine, MAX_QUEUE=1) as served:
        waiting = Background(served, prompt="a")
        until(lambda: len(engine.submitted) == 1)
        client = openai.OpenAI(base_url=served.url + "/v1", api_key="x", max_retries=0)
        with pytest.raises(openai.RateLimitError) as full:
            client.completions.create(model="null", prompt="a")
        assert int(full.value.response.headers["retry-after"]) >= 1
        served.call(lambda: engine.step(last(engine.submitted[0].seq_id, [97])))
        assert waiting.answer().status_code == 200


def test_an_error_in_mid_stream_is_raised() -> None:
    engine = ScriptedEngine()
    with serving(engine) as served:
        client = openai.OpenAI(base_url=served.url + "/v1", api_key="x", max_retries=0)
        heard: list[str] = []

        def listen() -> None:
            for chunk in client.completions.create(model="null", prompt="a", stream=True):
                heard.append(chunk.choices[0].text)
                served.call(lambda: engine.on_lost("it fell"))

        def speak() -> None:
            until(lambda: len(engine.submitted) == 1)
            served.call(lambda: engine.step(SequenceUpdate(engine.submitted[0].seq_id, [97])))

        speaker = threading.Thread(target=speak)
        speaker.start()
        with pytest.raises(openai.APIError, match="it fell"):
            listen()
        speaker.join()
        assert heard == ["a"]
