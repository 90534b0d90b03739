"""Token updates of the engine, gathered into the text of each prompt's answer.

What enters are `SequenceUpdate`s; what leaves is `News` for the frames, merged for as long as the writer
does not ask. Text is held back while it may be the beginning of a stop string, tokens never are.
One event loop thread touches this; nothing here knows HTTP or how the engine is reached.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Protocol

from adapters.base import FinishReason, Sequence
from services.engine.messages import SequenceTimings, SequenceUpdate
from services.errors import Refusal, backend_failed, slow_reader

_NO_TIMINGS = SequenceTimings(0.0, 0.0, 0.0, 0.0, 0, 0.0)


@dataclass(frozen=True, slots=True)
class Ending:
    """How one prompt's answer ended."""

    reason: FinishReason
    num_prompt_tokens: int
    num_output_tokens: int
    timings: SequenceTimings


@dataclass(slots=True)
class News:
    """What one prompt's answer gained since the last frame; `ending` with its last piece.

    With the ending come the API's own stamps, on the engine's clock: receipt and first write.
    """

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    ending: Ending | None = None
    received_s: float | None = None
    first_write_s: float | None = None


class TextStream(Protocol):
    """Incremental decoding, as `adapters.text.tokenizer.TokenStream` does it."""

    def push(self, token_ids: Seq[int]) -> str: ...

    def flush(self) -> str: ...


class StopMatcher:
    """Cuts a growing text before the earliest of its stop strings."""

    __slots__ = ("_held", "_stops")

    def __init__(self, stops: Seq[str]) -> None:
        self._stops = stops
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """Returns the text that is now safe to show, and whether a stop string is complete."""
        text = self._held + text
        ends = [(place + len(stop), place) for stop in self._stops if (place := text.find(stop)) >= 0]
        if ends:
            return text[: min(ends)[1]], True
        num_held = max(_num_begun(text, stop) for stop in self._stops)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held], False

    def flush(self) -> str:
        held, self._held = self._held, ""
        return held


def _num_begun(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with, short of the whole."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0


class Answer:
    """The answer to one prompt, on the API's side of the line."""

    __slots__ = (
        "_lead",
        "_news",
        "_num_output_tokens",
        "_stop",
        "_stream",
        "ending",
        "first_write_s",
        "index",
        "last_token_s",
        "live",
        "num_prompt_tokens",
        "seq_id",
        "stopped",
    )

    def __init__(
        self,
        live: LiveRequest,
        index: int,
        seq: Sequence,
        stream: TextStream,
        stops: Seq[str],
        lead: str = "",
    ) -> None:
        """`lead` stands before the first piece of text: the prompt, where that is to be echoed."""
        self.live = live
        self.index = index
        self.seq_id = seq.seq_id
        self.num_prompt_tokens = seq.num_prompt_tokens
        self.last_token_s: float | None = None
        self.stopped = False
        """A stop string was seen; the engine has yet to confirm the end."""
        self.ending: Ending | None = None
        self._lead = lead
        self.first_write_s: float | None = None
        """When its first token was taken for writing, on the clock of `live.arrival_s`."""
        self._stream = stream
        self._stop = StopMatcher(stops) if stops else None
        self._num_output_tokens = 0
        self._news: News | None = None

    def take(self, update: SequenceUpdate) -> None:
        """Add what the engine says. What it computed beyond a stop string is left out."""
        token_ids = update.token_ids
        if not self.stopped and token_ids:
            if self._stop is None:
                self._add(token_ids, self._stream.push(token_ids))
            else:
                self._add_until_stop(self._stop, token_ids)
        if update.finish_reason is not None:
            self._finish(update)

    @property
    def has_news(self) -> bool:
        return self._news is not None

    def collect(self, write_s: float | None = None) -> News | None:
        """What came since the last call; it is the caller's from then on, to be written at `write_s`."""
        news, self._news = self._news, None
        if news is not None:
            if self.first_write_s is None and news.token_ids:
                self.first_write_s = write_s
            if news.ending is not None:
                news.received_s, news.first_write_s = self.live.arrival_s, self.first_write_s
        return news

    def _add(self, token_ids: Seq[int], text: str) -> None:
        self._num_output_tokens += len(token_ids)
        if self._lead:
            text, self._lead = self._lead + text, ""
        news = self._news
        if news is None:
            self._news = News(self.index, text, list(token_ids))
        else:
            news.text += text
            news.token_ids += token_ids

    def _add_until_stop(self, stop: StopMatcher, token_ids: Seq[int]) -> None:
        for token_id in token_ids:
            text, self.stopped = stop.push(self._stream.push([token_id]))
            self._add([token_id], text)
            if self.stopped:
                return

    def _finish(self, update: SequenceUpdate) -> None:
        if not self.stopped:
            text = self._stream.flush()
            if self._stop is not None:
                text, self.stopped = self._stop.push(text)
                if not self.stopped:
                    text += self._stop.flush()
            self._add([], text)
        elif self._lead:
            self._add([], "")
        reason = "stop" if self.stopped else update.finish_reason
        assert reason is not None
        num_output, timings = self._num_output_tokens, update.timings or _NO_TIMINGS
        self.ending = Ending(reason, self.num_prompt_tokens, num_output, timings)
        if self._news is None:
            self._news = News(self.index)
        self._news.ending = self.ending


class LiveRequest:
    """One request whose answer is on its way, with one writer that waits for its news."""

    def __init__(
        self,
        request_id: str,
        sequences: Seq[Sequence],
        streams: Seq[TextStream],
        stops: Seq[str],
        *,
        streamed: bool,
        leads: Seq[str] = (),
        max_unread_tokens: int = 0,
    ) -> None:
        """`leads` are the texts to echo, one a prompt. A reader who leaves more than `max_unread_tokens`
        unread has left (0: any number may wait)."""
        self.request_id = request_id
        self.arrival_s = sequences[0].arrival_s
        self.answers = [
            Answer(self, index, seq, stream, stops, lead)
            for index, (seq, stream, lead) in enumerate(
                zip(sequences, streams, leads or [""] * len(sequences), strict=True)
            )
        ]
        self.num_prompt_tokens = sum(seq.num_prompt_tokens for seq in sequences)
        self.num_open = len(self.answers)
        self.is_queued = False
        """Whether it waits for the first token of any of its answers; kept by `InFlight`."""
        self.is_gone = False
        """Whether the client went away."""
        self.failure: Refusal | None = None
        self._streamed = streamed
        self._max_unread_tokens = max_unread_tokens if streamed else 0
        self._num_unread_tokens = 0
        self._changed: list[Answer] = []
        self._wake = asyncio.Event()

    @property
    def was_aborted(self) -> bool:
        """Whether an answer was ended by a cancel."""
        return any(answer.ending is not None and answer.ending.reason == "abort" for answer in self.answers)

    @property
    def is_over(self) -> bool:
        """Nothing more will come: answered, failed, or nobody is there to hear it."""
        return not self.num_open or self.is_gone or self.failure is not None

    def take(self, answer: Answer, update: SequenceUpdate) -> None:
        """Add an update of one of its answers and, where the writer wants to know, wake it."""
        is_marked = answer.has_news
        answer.take(update)
        if not is_marked and answer.has_news:
            self._changed.append(answer)
        self._num_unread_tokens += len(update.token_ids)
        if self._max_unread_tokens and self._num_unread_tokens > self._max_unread_tokens:
            self.fail(slow_reader(f"left {self._num_unread_tokens} tokens unread"))
        if update.finish_reason is not None:
            self.num_open -= 1
            if update.finish_reason == "error":
                self.fail(backend_failed(update.error or "the backend gave no reason"))
        if self._streamed or not self.num_open:
            self._wake.set()

    def fail(self, refusal: Refusal) -> None:
        """End it with an error; the first one counts."""
        self.failure = self.failure or refusal
        self._wake.set()

    def leave(self) -> None:
        """The client went away."""
        self.is_gone = True
        self._wake.set()

    async def news(self) -> list[News]:
        """Wait for news and take it all, merged; empty only when the request failed or the client left."""
        while not self._changed and not self.is_over:
            self._wake.clear()
            await self._wake.wait()
        self._num_unread_tokens = 0
        changed, self._changed = self._changed, []
        now_s = time.monotonic()
        return [news for answer in changed if (news := answer.collect(now_s)) is not None]

    async def whole(self) -> list[News]:
        """Wait for the end; every prompt's whole answer in order, unless it failed or the client left."""
        while not self.is_over:
            self._wake.clear()
            await self._wake.wait()
        return [news for answer in self.answers if (news := answer.collect()) is not None]
