"""The bytes of answers: server-sent frames and whole completions, in the completions and the chat shape.

A frame is made for every token and so written by hand: building a model costs five times as much. The
models of `services.contract.responses` parse what is written here. JSON is kept ASCII, so that no client
splits a frame at a Unicode line separator.
"""

from __future__ import annotations

import codecs
import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import fields
from operator import attrgetter
from typing import Literal, Protocol

from services.contract.timings import SequenceTimings
from services.core.outputs import ChoiceOutput, RequestOutput, SpelledToken

Shape = Literal["completions", "chat"]

_DONE = b"data: [DONE]\n\n"
_quote = json.JSONEncoder().encode
_OBJECTS = {
    "completions": ("text_completion", "text_completion"),
    "chat": ("chat.completion", "chat.completion.chunk"),
}
_TIMING_NAMES = [field.name for field in fields(SequenceTimings)]
_TIMINGS = "{" + ",".join(f'"{name}":%r' for name in _TIMING_NAMES) + "}"
_timing_values = attrgetter(*_TIMING_NAMES)


class Writer(Protocol):
    """How one request is answered: piece by piece, or as a whole."""

    def frame(self, output: RequestOutput) -> bytes:
        """One frame with an entry for each choice that gained something."""
        ...

    def end(self, finished: Sequence[ChoiceOutput]) -> bytes:
        """What follows the last frame; `finished` are the last outputs of all choices, in order."""
        ...

    def whole(self, output: RequestOutput) -> bytes:
        """The body of an answer that is not streamed; all choices are there, finished."""
        ...


class FrameWriter:
    """Writes the shapes of the OpenAI API; what all frames share is encoded once.

    `num_choices` is `n`: so many choices share a prompt, which counts once. `prompt_token_ids`, one list a
    choice where they were asked for, stand with a completion's first piece, or after a chat's choices.
    """

    __slots__ = (
        "_chunk_head",
        "_has_sent_role",
        "_num_choices",
        "_num_output_tokens",
        "_prompts",
        "_shape",
        "_spelled",
        "_texts",
        "_usage_prompt_tokens",
        "_whole_head",
        "_with_usage",
    )

    def __init__(
        self,
        shape: Shape,
        request_id: str,
        created: int,
        model: str,
        *,
        num_choices: int = 1,
        with_usage: bool = False,
        usage_prompt_tokens: int | None = None,
        prompt_token_ids: Sequence[list[int]] = (),
        spelled: Callable[[int], SpelledToken] | None = None,
    ) -> None:
        """`usage_prompt_tokens`, those of all prompts, puts the usage so far on every chunk. `spelled`
        spells a token, for logprobs."""
        self._shape = shape
        self._num_choices = num_choices
        self._with_usage = with_usage
        self._usage_prompt_tokens = usage_prompt_tokens
        self._num_output_tokens = 0
        self._prompts = dict(enumerate(prompt_token_ids))
        self._spelled = spelled
        self._texts: defaultdict[int, _TextLength] = defaultdict(_TextLength)
        self._has_sent_role = shape != "chat"
        whole, chunk = (
            f'{{"id":{_quote(request_id)},"object":"{name}","created":{created},"model":{_quote(model)},"choices":['
            for name in _OBJECTS[shape]
        )
        self._chunk_head = "data: " + chunk
        self._whole_head = whole

    def frame(self, output: RequestOutput) -> bytes:
        entries = ",".join([self._entry(choice) for choice in output])
        return f"{self._chunk_head}{entries}]{self._extras(output)}}}\n\n".encode()

    def end(self, finished: Sequence[ChoiceOutput]) -> bytes:
        if not self._with_usage:
            return _DONE
        usage = _usage(finished, self._num_choices)
        return f'{self._chunk_head}],"usage":{usage}}}\n\n'.encode() + _DONE

    def whole(self, output: RequestOutput) -> bytes:
        entries = ",".join([self._whole_entry(choice) for choice in output])
        usage = _usage(output, self._num_choices)
        return f'{self._whole_head}{entries}],"usage":{usage}{self._chat_prompt()}}}'.encode()

    def _extras(self, output: RequestOutput) -> str:
        """What a chunk has beside its choices."""
        if self._usage_prompt_tokens is None:
            return self._chat_prompt()
        self._num_output_tokens += sum(len(choice.token_ids) for choice in output)
        return f',"usage":{_counts(self._usage_prompt_tokens, self._num_output_tokens)}{self._chat_prompt()}'

    def _chat_prompt(self) -> str:
        if not self._prompts or self._shape != "chat":
            return ""
        prompt, self._prompts = self._prompts[0], {}
        return f',"prompt_token_ids":{_ids(prompt)}'

    def _own_prompt(self, choice: ChoiceOutput) -> str:
        if self._shape == "chat" or choice.index not in self._prompts:
            return ""
        return f',"prompt_token_ids":{_ids(self._prompts.pop(choice.index))}'

    def _entry(self, choice: ChoiceOutput) -> str:
        text = _quote(choice.text)
        if self._shape == "chat":
            role = "" if self._has_sent_role else '"role":"assistant",'
            self._has_sent_role = True
            content = f'"delta":{{{role}"content":{text}}}'
        else:
            content = f'"text":{text}'
        if self._prompts:
            content += self._own_prompt(choice)
        if self._spelled is not None:
            content += self._logprobs(choice, self._spelled)
        return _choice(choice, content)

    def _whole_entry(self, choice: ChoiceOutput) -> str:
        text = _quote(choice.text)
        is_chat = self._shape == "chat"
        content = f'"message":{{"role":"assistant","content":{text}}}' if is_chat else f'"text":{text}'
        if self._spelled is not None:
            content += self._logprobs(choice, self._spelled)
        return _choice(choice, content + self._own_prompt(choice))

    def _logprobs(self, choice: ChoiceOutput, spelled: Callable[[int], SpelledToken]) -> str:
        """The field that both shapes have."""
        entries = list(zip(choice.token_ids, choice.logprobs or (), strict=True))
        if self._shape == "chat":
            content = [
                {
                    **_one_logprob(spelled(i), own),
                    "top_logprobs": [_one_logprob(spelled(j), p) for j, p in top],
                }
                for i, (own, top) in entries
            ]
            return f',"logprobs":{_quote({"content": content})}'
        tokens = [spelled(token_id) for token_id in choice.token_ids]
        text = self._texts[choice.index]
        told = {
            "tokens": [token.text for token in tokens],
            "token_logprobs": [own for _, (own, _) in entries],
            "top_logprobs": [_likeliest(top, spelled) for _, (_, top) in entries],
            "text_offset": [text.add(token) for token in tokens],
        }
        return f',"logprobs":{_quote(told)}'


def _likeliest(top: Sequence[tuple[int, float]], spelled: Callable[[int], SpelledToken]) -> dict[str, float]:
    """Of tokens that are spelled alike the first, which is the likelier."""
    told: dict[str, float] = {}
    for token_id, logprob in top:
        told.setdefault(spelled(token_id).text, logprob)
    return told


class _TextLength:
    """Characters of a choice's text so far; one that several tokens make counts with its last."""

    __slots__ = ("_num_chars", "_utf8")

    def __init__(self) -> None:
        self._num_chars = 0
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token: SpelledToken) -> int:
        """Where this token's text begins: after a character before it that is complete or broken off now."""
        if token.raw is None:
            new = own = token.text
        else:
            # A part at its end is no text yet, neither of the answer nor of the token.
            new, own = self._utf8.decode(token.raw), codecs.utf_8_decode(token.raw, "replace")[0]
        begin = self._num_chars + max(0, len(new) - len(own))
        self._num_chars += len(new)
        return begin


def _one_logprob(token: SpelledToken, logprob: float) -> dict[str, object]:
    raw = None if token.raw is None else list(token.raw)
    return {"token": token.text, "logprob": logprob, "bytes": raw}


def _choice(choice: ChoiceOutput, content: str) -> str:
    head = f'{{"index":{choice.index},{content},"token_ids":{_ids(choice.token_ids)},"finish_reason":'
    return head + ("null}" if choice.finish_reason is None else _finish(choice))


def _finish(choice: ChoiceOutput) -> str:
    timings = (_TIMINGS % _timing_values(choice.timings)).replace("None", "null")
    return (
        f'"{choice.finish_reason}","num_prompt_tokens":{choice.num_prompt_tokens},'
        f'"num_output_tokens":{choice.num_output_tokens},"timings":{timings}}}'
    )


def _usage(finished: Sequence[ChoiceOutput], num_choices: int) -> str:
    num_prompt = sum(choice.num_prompt_tokens for choice in finished[::num_choices])
    num_output = sum(choice.num_output_tokens for choice in finished)
    return _counts(num_prompt, num_output)


def _counts(num_prompt: int, num_output: int) -> str:
    return (
        f'{{"prompt_tokens":{num_prompt},"completion_tokens":{num_output},'
        f'"total_tokens":{num_prompt + num_output}}}'
    )


def _ids(token_ids: Sequence[int]) -> str:
    return f"[{','.join(map(str, token_ids))}]"
