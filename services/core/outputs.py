"""Token updates of the engine, gathered into the text of each choice of a request.

Updates merge for as long as the writer does not ask for them. Text is held back while it may be the
beginning of a stop string; tokens never are. All of it runs on the event loop's thread.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import NamedTuple, Protocol

from adapters.base import FinishReason, Sequence, TokenLogprobs
from services.contract.timings import SequenceTimings
from services.core.special_text import without_marks
from services.engine.messages import SequenceUpdate
from services.errors import ApiError, backend_failed, slow_reader

NO_TIMINGS = SequenceTimings(0.0, 0.0, 0.0, 0.0, 0, 0.0)


class SpelledToken(NamedTuple):
    """A token as an answer with logprobs writes it."""

    text: str
    """A part of a character as `bytes:\\xe2\\x82`, so that two of them are not one; U+FFFD where its bytes
    are not known. Source: OpenAI's completions."""
    raw: bytes | None


@dataclass(slots=True)
class ChoiceOutput:
    """What one choice gained since the last frame. Reason, counts and timings come with its last output."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    timings: SequenceTimings = NO_TIMINGS
    logprobs: list[TokenLogprobs] | None = None
    """One for each of `token_ids`, where they were asked for."""


RequestOutput = list[ChoiceOutput]
"""What the choices of one request gained."""


class TextStream(Protocol):
    """Incremental decoding, as `adapters.text.tokenizer.TokenStream` does it."""

    def push(self, token_ids: Seq[int]) -> str: ...

    def flush(self) -> str: ...


class StopMatcher:
    """Cuts a growing text before the earliest of its stop strings, in time linear in the text.

    It also takes marks out of what it shows. `_matched` is how much of each stop string the text ends in.
    Source: Knuth, Morris, Pratt.
    """

    __slots__ = ("_held", "_matched", "_stops", "show")

    def __init__(self, stops: Seq[str], *, has_marks: bool = False) -> None:
        self._stops = [(stop, _fallbacks(stop)) for stop in stops]
        self._matched = [0] * len(stops)
        self._held = ""
        self.show: Callable[[str], str] = without_marks if has_marks else str
        """What is visible of a text that is not searched."""

    def push(self, text: str) -> tuple[str, bool]:
        """Returns the text that is now safe to show, and whether a stop string is complete."""
        matched = self._matched
        for end, char in enumerate(text, start=len(self._held) + 1):
            num_complete = 0
            for index, (stop, fallbacks) in enumerate(self._stops):
                length = matched[index]
                while length and stop[length] != char:
                    length = fallbacks[length - 1]
                length += stop[length] == char
                matched[index] = length
                if length == len(stop):
                    num_complete = max(num_complete, length)
            if num_complete:
                return self.show((self._held + text)[: end - num_complete]), True
        text = self._held + text
        num_safe = len(text) - max(matched)
        self._held = text[num_safe:]
        return self.show(text[:num_safe]), False

    def flush(self) -> str:
        held, self._held = self._held, ""
        return self.show(held)


@lru_cache(maxsize=256)
def _fallbacks(stop: str) -> list[int]:
    """For each beginning of `stop`, the longest shorter beginning that it ends in."""
    fallbacks = [0]
    length = 0
    for char in stop[1:]:
        while length and stop[length] != char:
            length = fallbacks[length - 1]
        length += stop[length] == char
        fallbacks.append(length)
    return fallbacks


class ChoiceState:
    """One choice of a request: the answer to one prompt, as far as it has come."""

    __slots__ = (
        "_echo",
        "_first_write_s",
        "_min_tokens",
        "_output",
        "_stop",
        "_stream",
        "finish_reason",
        "index",
        "is_stopped",
        "last_token_s",
        "max_tokens",
        "num_output_tokens",
        "num_prompt_tokens",
        "request",
        "seq_id",
    )

    def __init__(
        self,
        request: RequestState,
        index: int,
        seq: Sequence,
        stream: TextStream,
        stop: StopMatcher | None,
        echo: str,
    ) -> None:
        """`echo` stands before the first piece of text: the prompt, where that was asked for, or ""."""
        self.request = request
        self.index = index
        self.seq_id = seq.seq_id
        self.num_prompt_tokens = seq.num_prompt_tokens
        self.max_tokens = seq.params.max_tokens
        self.last_token_s: float | None = None
        self.is_stopped = False
        """A stop string was seen; the engine has yet to confirm the end."""
        self.finish_reason: FinishReason | None = None
        self._echo = echo
        self._first_write_s: float | None = None
        self._stream = stream
        self._stop = stop
        self._min_tokens = seq.params.min_tokens
        self.num_output_tokens = 0
        self._output: ChoiceOutput | None = None

    @property
    def has_output(self) -> bool:
        return self._output is not None

    def add_update(self, update: SequenceUpdate) -> None:
        """Add what the engine says. What it computed beyond a stop string is left out."""
        token_ids = update.token_ids
        if not self.is_stopped and token_ids:
            # The token that ends an answer has no text of its own.
            shown = token_ids[:-1] if update.finish_reason == "stop" else token_ids
            num_before = self.num_output_tokens
            if self._stop is None:
                self._add(token_ids, self._stream.push(shown))
            else:
                self._add_until_stop(self._stop, token_ids, len(shown))
            if update.logprobs is not None and self._output is not None:
                kept = update.logprobs[: self.num_output_tokens - num_before]
                self._output.logprobs = (self._output.logprobs or []) + kept
        if update.finish_reason is not None:
            self._finish(update.finish_reason, update.timings or NO_TIMINGS)

    def take_output(self, write_s: float | None = None) -> ChoiceOutput | None:
        """What came since the last call. The caller owns it, and writes it at `write_s`."""
        output, self._output = self._output, None
        if output is not None:
            if self._first_write_s is None and output.token_ids:
                self._first_write_s = write_s
            if output.finish_reason is not None:
                output.timings = replace(
                    output.timings, received_s=self.request.arrival_s, first_write_s=self._first_write_s
                )
        return output

    def _add(self, token_ids: Seq[int], text: str) -> ChoiceOutput:
        self.num_output_tokens += len(token_ids)
        if self._echo:
            text, self._echo = self._echo + text, ""
        output = self._output
        if output is None:
            output = self._output = ChoiceOutput(self.index, text, list(token_ids))
        else:
            output.text += text
            output.token_ids += token_ids
        return output

    def _add_until_stop(self, stop: StopMatcher, token_ids: Seq[int], num_shown: int) -> None:
        for at, token_id in enumerate(token_ids):
            text = self._stream.push([token_id]) if at < num_shown else ""
            if self.num_output_tokens + 1 < self._min_tokens:
                text = stop.show(text)
            else:
                text, self.is_stopped = stop.push(text)
            self._add([token_id], text)
            if self.is_stopped:
                return

    def _finish(self, reason: FinishReason, timings: SequenceTimings) -> None:
        text = ""
        if not self.is_stopped:
            text = self._stream.flush()
            if self._stop is not None:
                text, self.is_stopped = self._stop.push(text)
                if not self.is_stopped:
                    text += self._stop.flush()
        output = self._add([], text)
        self.finish_reason = output.finish_reason = "stop" if self.is_stopped else reason
        output.num_prompt_tokens = self.num_prompt_tokens
        output.num_output_tokens = self.num_output_tokens
        output.timings = timings


class RequestState:
    """One request in flight, with one writer that waits for its output."""

    def __init__(
        self,
        request_id: str,
        sequences: Seq[Sequence],
        streams: Seq[TextStream],
        stops: Seq[str],
        *,
        streamed: bool,
        has_marks: bool = False,
        keeps_prompts: bool = False,
        echoes: Seq[str] = (),
        max_unread_tokens: int = 0,
        spelled: Callable[[int], SpelledToken] | None = None,
    ) -> None:
        """With `has_marks`, `streams` give the marks of `services.core.special_text`. `echoes` are the texts
        to echo, one a choice. A reader who leaves more than `max_unread_tokens` unread is cut off (0: any
        number may wait). `spelled` spells a token, for an answer with logprobs."""
        self.request_id = request_id
        self.spelled = spelled
        self.arrival_s = sequences[0].arrival_s
        self.prompt_token_ids = [seq.prompt_token_ids for seq in sequences] if keeps_prompts else []
        """One list a choice, where the answer is to repeat them."""
        self.choices = [
            ChoiceState(
                self, index, seq, stream, StopMatcher(stops, has_marks=has_marks) if stops else None, echo
            )
            for index, (seq, stream, echo) in enumerate(
                zip(sequences, streams, echoes or [""] * len(sequences), strict=True)
            )
        ]
        self.fingerprint = hash(tuple(tuple(seq.prompt_token_ids) for seq in sequences))
        """The same for requests of the same prompts."""
        self.num_prompt_tokens = sum(seq.num_prompt_tokens for seq in sequences)
        self.num_unfinished = len(self.choices)
        self.is_queued = False
        """Whether none of its choices has a token yet; kept by `InFlight`."""
        self.is_disconnected = False
        """Whether the client went away."""
        self.error: ApiError | None = None
        self._streamed = streamed
        self._max_unread_tokens = max_unread_tokens if streamed else 0
        self._num_unread_tokens = 0
        self._changed: list[ChoiceState] = []
        self._wake = asyncio.Event()

    @property
    def was_aborted(self) -> bool:
        """Whether a cancel ended one of its choices."""
        return any(choice.finish_reason == "abort" for choice in self.choices)

    @property
    def is_over(self) -> bool:
        """Nothing more will come: all choices are finished, it failed, or the client went away."""
        return not self.num_unfinished or self.is_disconnected or self.error is not None

    def add_update(self, choice: ChoiceState, update: SequenceUpdate) -> None:
        """Add an update to one of its choices and, where the writer wants to know, wake it."""
        had_output = choice.has_output
        choice.add_update(update)
        if not had_output and choice.has_output:
            self._changed.append(choice)
        self._num_unread_tokens += len(update.token_ids)
        if self._max_unread_tokens and self._num_unread_tokens > self._max_unread_tokens:
            self.fail(slow_reader(f"left {self._num_unread_tokens} tokens unread"))
        if update.finish_reason is not None:
            self.num_unfinished -= 1
            if update.finish_reason == "error":
                self.fail(backend_failed(update.error or "the backend gave no reason"))
        if self._streamed or not self.num_unfinished:
            self._wake.set()

    def fail(self, error: ApiError) -> None:
        """End it with an error; the first one counts."""
        self.error = self.error or error
        self._wake.set()

    def disconnect(self) -> None:
        """The client went away."""
        self.is_disconnected = True
        self._wake.set()

    async def next_output(self) -> RequestOutput:
        """Wait for output and take it all, merged; empty only when it failed or the client went away."""
        while not self._changed and not self.is_over:
            self._wake.clear()
            await self._wake.wait()
        self._num_unread_tokens = 0
        changed, self._changed = self._changed, []
        now_s = time.monotonic()
        return [output for choice in changed if (output := choice.take_output(now_s)) is not None]

    async def whole_output(self) -> RequestOutput:
        """Wait for the end; all choices in order, whole unless it failed or the client went away."""
        while not self.is_over:
            self._wake.clear()
            await self._wake.wait()
        return [output for choice in self.choices if (output := choice.take_output()) is not None]
