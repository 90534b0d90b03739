"""What came back for one prompt: raw stamps, tokens and counts, before any metric is derived.

An `Answer` is open, then ended (its user may ask again), then complete (its counts are known too, or it
failed). A finishing entry that carries counts ends it. Of other servers the last entry with a reason holds,
since some send one with every entry, and the end of the stream ends it. Values of other types than the API's
are left out or refused here: a row holds none. Instants are seconds of `time.perf_counter`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from adapters.text.unicode_text import printable
from harness.plan.schedule import PlannedRequest

_NO_REASON = ("", "null", "none")
"""What servers write, in small letters or capitals, where an answer goes on; by the API it is null."""
INT32_LIMIT = 2**31
"""Rows hold whole numbers below it."""


@dataclass(slots=True, eq=False)
class Answer:
    """One planned request on its way. Mutated by the client until `is_complete`."""

    planned: PlannedRequest
    scheduled_s: float
    group_id: int = -1
    group_size: int = 1
    body_sha256: str | None = None
    sent_s: float | None = None
    written_s: float | None = None
    """When a connection was there and the request was handed to it; `sent_s` is when one was asked for."""
    chunk_s: list[float] = field(default_factory=list)
    chunk_tokens: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    has_token_ids: bool = True
    """False from the first text on that came without the ids of its tokens."""
    finish_s: float | None = None
    finish_reason: str | None = None
    num_prompt_tokens: int | None = None
    num_output_tokens: int | None = None
    num_cached_tokens: int | None = None
    """Prompt tokens that the server says it took from a prefix cache."""
    timings: dict[str, Any] = field(default_factory=dict)
    """As sent; the names are those of `services.contract.timings.SequenceTimings`."""
    server_request_id: str | None = None
    error: str | None = None
    is_complete: bool = False
    on_ended: Callable[[Answer], None] | None = None
    """Called once, when the user who asked may go on."""
    on_complete: Callable[[Answer], None] | None = None
    """Called once, when nothing about the answer will change any more."""

    def add(self, choice: dict[str, Any], now_s: float) -> None:
        """Take one entry of an event's `choices`. It counts as a chunk only if it carries a token.

        Raises:
            ValueError: its text is no string, or its `token_ids` are no list of ids.
        """
        if self.is_complete:
            return
        text = choice.get("text")
        if not text:  # what a model thinks comes under names of its own, and is made of tokens as well
            delta = choice.get("delta") or {}
            text = delta.get("content") or delta.get("reasoning_content") or delta.get("reasoning") or ""
        token_ids = choice.get("token_ids")
        if token_ids is None:
            token_ids = choice.get("response_token_ids")  # SGLang's newer name
        if not isinstance(text, str):
            raise ValueError(f"a choice's text is {type(text).__name__}")
        if token_ids and not (isinstance(token_ids, list) and all(map(_is_id, token_ids))):
            raise ValueError("a choice's token_ids are no list of token ids")
        if text:
            self.text.append(text)
        if token_ids:
            self.chunk_s.append(now_s)
            self.chunk_tokens.append(len(token_ids))
            self.token_ids.extend(token_ids)
        elif text and token_ids is None:
            # An empty list is different: text that was held back, and no new token.
            self.chunk_s.append(now_s)
            self.has_token_ids = False
        if text and self.finish_reason is not None:
            self.finish_s = now_s
        reason = choice.get("finish_reason")
        if not reason or str(reason).strip().lower() in _NO_REASON:
            return
        self.finish_reason = as_text(reason)
        self.finish_s = now_s
        self.timings = _numbers(choice.get("timings"))
        self.num_cached_tokens = as_count(self.timings.get("num_cached_tokens"))
        own_count = as_count(choice.get("num_output_tokens"))
        if reason in ("error", "abort"):
            self.fail(f"the server ended the answer: finish_reason {reason}", now_s)
        elif own_count is not None:
            self.num_prompt_tokens = as_count(choice.get("num_prompt_tokens"))
            self.num_output_tokens = own_count
            self._end()
            self._complete()

    def add_usage(self, usage: dict[str, Any]) -> None:
        """Take the counts of a request that carried this prompt alone.

        Servers may send them with every event, counting up; the last ones hold.
        """
        if self.is_complete:
            return
        for name, key in (("num_prompt_tokens", "prompt_tokens"), ("num_output_tokens", "completion_tokens")):
            if (count := as_count(usage.get(key))) is not None:
                setattr(self, name, count)
        details = usage.get("prompt_tokens_details")
        if isinstance(details, dict):
            self.num_cached_tokens = as_count(details.get("cached_tokens"))

    def close(self, now_s: float, problem: str | None) -> None:
        """The stream is over; whatever is still missing is an error, named in `problem` or here."""
        if self.is_complete:
            return
        if self.finish_reason is None:
            self.fail(problem or "the stream ended before the answer did", now_s)
        elif self.num_output_tokens is None:
            self.fail(problem or "no token counts: the server's stream carried no usage", now_s)
        elif self.num_output_tokens < min(2, num_pieces := len(self.chunk_s)):
            counted = self.num_output_tokens
            self.fail(f"the server counted {counted} tokens, but streamed {num_pieces} pieces of text", now_s)
        elif self.num_output_tokens > 1 and not self.chunk_s:
            self.fail(f"the server counted {self.num_output_tokens} tokens, but streamed no text", now_s)
        else:
            self._end()
            self._complete()

    def fail(self, error: str, now_s: float) -> None:
        if self.is_complete:
            return
        self.error = as_text(error)
        if self.finish_s is None:
            self.finish_s = now_s
        self._end()
        self._complete()

    @property
    def output_sha256(self) -> str | None:
        """Of the token ids in decimal, joined by commas; None where the server sent none."""
        if not self.has_token_ids or not self.token_ids:
            return None
        return hashlib.sha256(",".join(map(str, self.token_ids)).encode()).hexdigest()

    @property
    def text_sha256(self) -> str | None:
        return (
            hashlib.sha256("".join(self.text).encode("utf-8", "surrogatepass")).hexdigest()
            if self.text
            else None
        )

    def _end(self) -> None:
        callback, self.on_ended = self.on_ended, None
        if callback is not None:
            callback(self)

    def _complete(self) -> None:
        self.is_complete = True
        callback, self.on_complete = self.on_complete, None
        if callback is not None:
            callback(self)


def as_count(value: Any) -> int | None:
    """A count as the server wrote it, 8.0 for 8 included; None for what is none."""
    return int(value) if _is_number(value) and value >= 0 and value == int(value) else None


def as_text(value: object) -> str:
    """What a server wrote where a text belongs, as every file and terminal takes it."""
    return printable(str(value))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < INT32_LIMIT


def _is_id(value: Any) -> bool:
    return type(value) is int and value >= 0


def _numbers(timings: Any) -> dict[str, Any]:
    found = timings if isinstance(timings, dict) else {}
    return {name: value for name, value in found.items() if _is_number(value)}


def fail_all(answers: Sequence[Answer], error: str, now_s: float) -> None:
    for answer in answers:
        answer.fail(error, now_s)
