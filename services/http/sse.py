"""The bytes of answers: server-sent frames and whole completions, in the completions and the chat shape.

What enters are texts, token ids and timings; what leaves is JSON that the models of `services.contract`
parse. A frame is made for every token and so written by hand: building a model costs five times as much.
JSON is kept ASCII, so that no client splits a frame at a Unicode line separator.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Literal, Protocol

from services.core.outputs import Ending, News

Shape = Literal["completions", "chat"]

_DONE = b"data: [DONE]\n\n"
_quote = json.JSONEncoder().encode
_OBJECTS = {
    "completions": ("text_completion", "text_completion"),
    "chat": ("chat.completion", "chat.completion.chunk"),
}


class Writer(Protocol):
    """How one request is answered: piece by piece, or as a whole."""

    def frame(self, news: Iterable[News]) -> bytes:
        """One frame with an entry for each prompt that has news."""
        ...

    def end(self, endings: Sequence[Ending]) -> bytes:
        """What follows the last frame; `endings` are those of all prompts, in order."""
        ...

    def whole(self, answers: Sequence[News]) -> bytes:
        """The body of an answer that is not streamed; each of `answers` has its ending."""
        ...


class FrameWriter:
    """Writes the shapes of the OpenAI API; what all frames share is encoded once.

    `num_choices` is `n`: as many answers share a prompt, which counts once.
    """

    __slots__ = ("_chunk_head", "_is_greeted", "_num_choices", "_shape", "_whole_head", "_with_usage")

    def __init__(
        self,
        shape: Shape,
        request_id: str,
        created: int,
        model: str,
        *,
        num_choices: int = 1,
        with_usage: bool = False,
    ) -> None:
        self._shape = shape
        self._num_choices = num_choices
        self._with_usage = with_usage
        self._is_greeted = shape != "chat"
        whole, chunk = (
            f'{{"id":{_quote(request_id)},"object":"{name}","created":{created},"model":{_quote(model)},"choices":['
            for name in _OBJECTS[shape]
        )
        self._chunk_head = "data: " + chunk
        self._whole_head = whole

    def frame(self, news: Iterable[News]) -> bytes:
        entries = ",".join([self._entry(item) for item in news])
        return f"{self._chunk_head}{entries}]}}\n\n".encode()

    def end(self, endings: Sequence[Ending]) -> bytes:
        if not self._with_usage:
            return _DONE
        usage = _usage(endings, self._num_choices)
        return f'{self._chunk_head}],"usage":{usage}}}\n\n'.encode() + _DONE

    def whole(self, answers: Sequence[News]) -> bytes:
        entries = ",".join([self._whole_entry(answer) for answer in answers])
        endings = [answer.ending for answer in answers if answer.ending is not None]
        usage = _usage(endings, self._num_choices)
        return f'{self._whole_head}{entries}],"usage":{usage}}}'.encode()

    def _entry(self, news: News) -> str:
        text = _quote(news.text)
        if self._shape == "chat":
            greeting = "" if self._is_greeted else '"role":"assistant",'
            self._is_greeted = True
            content = f'"delta":{{{greeting}"content":{text}}}'
        else:
            content = f'"text":{text}'
        return _choice(news, content)

    def _whole_entry(self, answer: News) -> str:
        text = _quote(answer.text)
        is_chat = self._shape == "chat"
        content = f'"message":{{"role":"assistant","content":{text}}}' if is_chat else f'"text":{text}'
        return _choice(answer, content)


def _choice(news: News, content: str) -> str:
    token_ids = ",".join(map(str, news.token_ids))
    head = f'{{"index":{news.index},{content},"token_ids":[{token_ids}],"finish_reason":'
    return head + ("null}" if news.ending is None else _ending(news.ending, news))


def _ending(ending: Ending, news: News) -> str:
    t = ending.timings
    return (
        f'"{ending.reason}","num_prompt_tokens":{ending.num_prompt_tokens},'
        f'"num_output_tokens":{ending.num_output_tokens},"timings":{{"queue_s":{t.queue_s!r},'
        f'"batch_wait_s":{t.batch_wait_s!r},"prefill_s":{t.prefill_s!r},"decode_s":{t.decode_s!r},'
        f'"num_steps":{t.num_steps},"mean_batch_size":{t.mean_batch_size!r},'
        f'"received_s":{_instant(news.received_s)},"first_token_s":{_instant(t.first_token_s)},'
        f'"first_write_s":{_instant(news.first_write_s)}}}}}'
    )


def _instant(at_s: float | None) -> str:
    return "null" if at_s is None else repr(at_s)


def _usage(endings: Sequence[Ending], num_choices: int) -> str:
    num_prompt = sum(ending.num_prompt_tokens for ending in endings[::num_choices])
    num_output = sum(ending.num_output_tokens for ending in endings)
    return (
        f'{{"prompt_tokens":{num_prompt},"completion_tokens":{num_output},'
        f'"total_tokens":{num_prompt + num_output}}}'
    )
