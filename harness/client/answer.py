"""What came back for one prompt: raw stamps, tokens and counts, before any metric is derived.

An `Answer` is open, then ended (its own finishing entry came, its user may ask again), then complete (its
counts are known too, or it failed). Instants are seconds of `time.perf_counter`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from harness.plan.schedule import PlannedRequest

_NO_REASON = (None, "", "null", "None")
"""What servers write where an answer goes on; by the API it is null."""


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
        """Take one entry of an event's `choices`. It counts as a chunk only if it carries a token."""
        text = choice.get("text") or (choice.get("delta") or {}).get("content") or ""
        token_ids = choice.get("token_ids")
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
        reason = choice.get("finish_reason")
        if reason in _NO_REASON:
            return
        self.finish_reason = str(reason)
        self.finish_s = now_s
        self.timings = choice.get("timings") or {}
        self.num_cached_tokens = as_count(self.timings.get("num_cached_tokens"))
        self._end()
        own_count = as_count(choice.get("num_output_tokens"))
        if reason in ("error", "abort"):
            self.fail(f"the server ended the answer: finish_reason {reason}", now_s)
        elif own_count is not None:
            self.num_prompt_tokens = as_count(choice.get("num_prompt_tokens"))
            self.num_output_tokens = own_count
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
        elif not self.num_output_tokens and self.chunk_s:
            num_pieces = len(self.chunk_s)
            self.fail(f"the server counted 0 tokens, but streamed {num_pieces} pieces of text", now_s)
        else:
            self._complete()

    def fail(self, error: str, now_s: float) -> None:
        if self.is_complete:
            return
        self.error = error
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
    """A count as the server wrote it; None for what is none."""
    is_count = isinstance(value, int) and not isinstance(value, bool) and value >= 0
    return value if is_count else None


def fail_all(answers: Sequence[Answer], error: str, now_s: float) -> None:
    for answer in answers:
        answer.fail(error, now_s)
