"""Whom the API of one replica refuses, since too much waits there: the service's own limit says so.

The service learns of a step when it is done, and a simulated step is known as soon as it begins. What it
changes is kept until then.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import NamedTuple

from adapters.base import Sequence
from services.core.queue_limit import QueueLimit
from services.engine.limits import SchedulerLimits


@dataclass(slots=True, eq=False)
class ApiRequest:
    """The prompts of one HTTP request, which waits until one of them has a token."""

    num_prompt_tokens: int
    has_begun: bool = False


class Report(NamedTuple):
    """What the service learns of a step when it is done."""

    done_s: float
    begun: Seq[ApiRequest]
    """Those that got their first token."""
    num_ended: int
    """Prompts."""
    num_running: int
    num_prefilling: int
    """Requests without a token of which a prompt is being computed: they wait no longer."""


class ApiQueue:
    """`max_requests` and `max_tokens` are MAX_QUEUE and MAX_QUEUE_TOKENS."""

    def __init__(self, max_requests: int, max_tokens: int) -> None:
        self._limit = QueueLimit(max_requests, max_tokens)
        self._report: Report | None = None  # of the step under way, or of one that is done
        self._num_queued = self._num_tokens = self._num_prompts = self._num_running = self._num_prefilling = 0
        self._has_starts = False
        self.num_unbegun = 0
        """Requests without a token, by all that is reported: no later step is known."""

    @property
    def _num_waiting(self) -> int:
        return self._num_queued - self._num_prefilling

    def accept(
        self, sequences: Seq[Sequence], now_s: float, limits: SchedulerLimits, *, together: bool
    ) -> ApiRequest:
        """One request; `limits` are on its lengths, at which the service looks before it counts tokens.

        Raises:
            ApiError: 429, too much waits.
            RequestTooLong: it can never fit.
        """
        if self._report is not None and self._report.done_s <= now_s:
            self._learn(self._report)
        num_prompts = len(sequences)
        num_tokens = sum([seq.num_prompt_tokens for seq in sequences])
        waiting_prompts = self._num_prompts - self._num_running
        if self._num_queued or waiting_prompts > 0:
            waiting = self._num_waiting, max(0, waiting_prompts), self._num_tokens
            with self._limit.enter(*waiting, num_prompts, now_s):
                limits.check(sequences, together=together)
            self._limit.check_tokens(self._num_waiting, self._num_tokens, num_tokens, now_s)
        else:  # any request is welcome
            limits.check(sequences, together=together)
        self._num_queued += 1
        self.num_unbegun += 1
        self._num_tokens += num_tokens
        self._num_prompts += num_prompts
        return ApiRequest(num_tokens)

    def report(self, report: Report) -> None:
        """Of the steps in their order, each as soon as it is known: the one before is done by then."""
        if self._report is not None:
            self._learn(self._report)
        self._report = report
        self.num_unbegun -= len(report.begun)

    def _learn(self, report: Report) -> None:
        done_s, begun, num_ended, self._num_running, self._num_prefilling = report
        self._report = None
        self._num_prompts -= num_ended
        if begun:
            self._num_queued -= len(begun)
            self._num_tokens -= sum([request.num_prompt_tokens for request in begun])
        num_waiting = self._num_waiting
        if (num_waiting and begun) or (self._has_starts and not num_waiting):
            self._limit.started(len(begun), num_waiting, done_s)
            self._has_starts = num_waiting > 0
