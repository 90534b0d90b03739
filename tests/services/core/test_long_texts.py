"""Long texts and foreign tokens, with a tokenizer of the kind that models bring."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from adapters.text.chat_template import ChatTemplate
from adapters.text.tokenizer import HFTokenizer
from services.core import service
from services.core.byte_limit import ByteLimit
from services.errors import ApiError
from tests.services.http.test_app import Background
from tests.services.served import Served, events, serving, stream

TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant: "
NUM_ROWS = 257
"""Of the null backend's embedding, if it had one."""


class CountedTokenizer(HFTokenizer):
    """Notes how many bytes it is at work on in all threads."""

    def __init__(self, raw: tokenizers.Tokenizer) -> None:
        super().__init__(raw, chat_template=ChatTemplate(TEMPLATE, {}))
        self.most_bytes = 0
        self.num_calls = 0
        self._num_bytes = 0
        self._lock = threading.Lock()

    def encode_batch(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[list[int]]:
        num_bytes = sum(len(text.encode()) for text in texts)
        with self._lock:
            self.num_calls += 1
            self._num_bytes += num_bytes
            self.most_bytes = max(self.most_bytes, self._num_bytes)
        time.sleep(0.02)
        try:
            return super().encode_batch(texts, add_special_tokens=add_special_tokens)
        finally:
            with self._lock:
                self._num_bytes -= num_bytes


def bytes_bpe() -> tokenizers.Tokenizer:
    """A token for each byte, and one that the weights have no row for."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {char: index for index, char in enumerate([*alphabet, "<|end|>"])}
    raw = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens(["<|end|>", "<|tool|>"])
    assert raw.token_to_id("<|tool|>") == NUM_ROWS
    return raw


def foreign() -> tokenizers.Tokenizer:
    """Its normalizer may drop characters, so that the length of a text tells nothing."""
    raw = bytes_bpe()
    raw.normalizer = normalizers.Strip()
    return raw


@pytest.fixture
def tokenizer(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> CountedTokenizer:
    counted = CountedTokenizer(request.param())
    monkeypatch.setattr(service, "load_tokenizer", lambda config: counted)
    return counted


@pytest.fixture
def served(tokenizer: CountedTokenizer) -> Iterator[Served]:
    with serving(
        NULL_STEP_MS=2, MAX_MODEL_LEN=600_000, MAX_STEP_TOKENS=600_000, MAX_QUEUE_TOKENS=10_000_000
    ) as served:
        yield served


def chat_fields(text: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], "max_tokens": 2}


foreign_too = pytest.mark.parametrize("tokenizer", [bytes_bpe, foreign], indirect=True)


@pytest.mark.parametrize("tokenizer", [bytes_bpe], indirect=True)
def test_a_text_that_can_never_fit_is_refused_before_it_is_tokenized(tokenizer: CountedTokenizer) -> None:
    with serving(MAX_MODEL_LEN=4096) as served:
        for path, fields in (
            ("/generate", {"prompt": "x" * 950_000}),
            ("/v1/chat/completions", chat_fields("x" * 950_000)),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x" * 950_000}] * 4}),
        ):
            answer = served.post(path, **fields)
            assert (answer.status_code, answer.json()["error"]["code"]) == (400, "context_length_exceeded")
    assert tokenizer.num_calls == 0


@foreign_too
def test_so_many_bytes_are_tokenized_at_once_and_streams_go_on(
    tokenizer: CountedTokenizer, served: Served
) -> None:
    streaming = Background(served, prompt="a", max_tokens=200, ignore_eos=True, stream=True)
    fields = {**chat_fields("x" * 400_000), "timeout_s": 15}
    asked = [Background(served, path="/v1/chat/completions", **fields) for _ in range(6)]
    assert {background.answer().status_code for background in asked} == {200}
    assert events(streaming.answer().text)[-1] == "[DONE]"
    assert 400_000 < tokenizer.most_bytes <= 1 << 20


@foreign_too
@pytest.mark.parametrize("path", ["/generate", "/v1/chat/completions"])
def test_a_token_that_the_model_has_no_row_for_is_refused_alone(
    tokenizer: CountedTokenizer, served: Served, path: str
) -> None:
    other = Background(served, prompt="a", max_tokens=200, ignore_eos=True)
    text = "call <|tool|> now"
    answer = served.post(path, **({"prompt": text} if path == "/generate" else chat_fields(text)))
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (422, "invalid_value")
    assert "a text that is token 257 here, but the model has 257 tokens" in error["message"]
    assert other.answer().status_code == 200
    assert stream(served.url, prompt="good", max_tokens=2)


def test_the_limit_lets_in_by_bytes_and_in_order() -> None:
    async def go() -> None:
        limit, log = ByteLimit(at_once=10, waiting=100), list[str]()

        async def work(name: str, num_bytes: int, turns: int) -> None:
            async with limit.hold(num_bytes):
                log.append(f"+{name}")
                for _ in range(turns):
                    await asyncio.sleep(0)
                log.append(f"-{name}")

        work_of = [("a", 6, 20), ("b", 4, 5), ("c", 50, 3), ("d", 1, 1), ("e", 9, 1)]
        await asyncio.gather(*(work(*fields) for fields in work_of))
        assert log == ["+a", "+b", "-b", "-a", "+c", "-c", "+d", "+e", "-d", "-e"]

    asyncio.run(go())


def test_beyond_what_may_wait_the_limit_refuses() -> None:
    async def go() -> None:
        limit = ByteLimit(at_once=10, waiting=25)
        async with limit.hold(10):
            waiting = asyncio.create_task(limit.hold(20).__aenter__())
            await asyncio.sleep(0)
            with pytest.raises(ApiError) as refused:
                async with limit.hold(6):
                    pass
            assert (refused.value.status, refused.value.retry_after_s) == (429, 1)
        await waiting
        assert limit._waiting_room == 25

    asyncio.run(go())
