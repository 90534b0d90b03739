"""The requests in flight, and the load that they are.

A request is *waiting* until one of its choices is being computed, *queued* until one of them has a token.
Both differ from the engine's queue, which counts sequences and learns of a request one message later.
All of it runs on the event loop's thread.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from services.core.metrics import Metrics
from services.core.outputs import NO_TIMINGS, ChoiceState, RequestState
from services.engine.messages import SequenceUpdate, StepReport
from services.errors import ApiError


@dataclass(slots=True)
class InFlight:
    metrics: Metrics
    requests: set[RequestState] = field(default_factory=set)
    _choices: dict[int, ChoiceState] = field(default_factory=dict)
    """By sequence id: what the engine may still send updates for."""
    _leaving: set[int] = field(default_factory=set)
    """Dropped sequences whose end the engine has not confirmed: they still take its room."""
    num_running: int = 0
    """Prompts with a slot, as the engine said last."""
    _prefilling_seq_ids: list[int] = field(default_factory=list)
    _num_queued: int = 0
    queued_tokens: int = 0
    """Prompt tokens of the queued requests."""

    @property
    def num_waiting(self) -> int:
        """Queued requests, less those of which a prompt is being computed."""
        computed = [choice for i in self._prefilling_seq_ids if (choice := self._choices.get(i))]
        return self._num_queued - len({id(c.request) for c in computed if c.request.is_queued})

    @property
    def queue_depth(self) -> int:
        """Prompts without a slot, those on their way to the engine included."""
        return max(0, len(self._choices) + len(self._leaving) - self.num_running)

    @property
    def outstanding_tokens(self) -> int:
        """What may still have to be computed: prompts without a token yet, and tokens up to each limit."""
        return sum(
            (choice.num_prompt_tokens if choice.request.is_queued else 0)
            + choice.max_tokens
            - choice.num_output_tokens
            for choice in self._choices.values()
        )

    def add(self, request: RequestState) -> None:
        self.requests.add(request)
        request.is_queued = True
        self._num_queued += 1
        self.queued_tokens += request.num_prompt_tokens
        for choice in request.choices:
            self._choices[choice.seq_id] = choice

    def drop(self, request: RequestState) -> list[int]:
        """Take no more updates for it; returns the sequences that the engine may still work on."""
        self._leave_queue(request)
        leaving = [
            choice
            for choice in request.choices
            if self._choices.pop(choice.seq_id, None) and choice.finish_reason is None
        ]
        seq_ids = [choice.seq_id for choice in leaving]
        self._leaving.update(seq_ids)
        self.metrics.wasted("cancelled", sum(choice.num_output_tokens for choice in leaving))
        return seq_ids

    def update(self, report: StepReport) -> tuple[list[int], int]:
        """Bring each update to its request; updates of dropped requests are passed over.

        Returns the sequences whose stop string just came, and how many requests got their first token.
        """
        self.num_running = report.num_running
        self._prefilling_seq_ids = report.prefilling_seq_ids
        record = report.record
        now_s = 0.0 if record is None else record.start_s + record.duration_s
        metrics = self.metrics
        stopped: list[int] = []
        num_started = 0
        for update in report.updates:
            choice = self._choices.get(update.seq_id)
            if choice is None:
                self._update_leaving(update)
                continue
            request, was_stopped = choice.request, choice.is_stopped
            if update.token_ids and self._leave_queue(request):
                num_started += 1
            if not was_stopped:
                _observe_tokens(metrics, choice, len(update.token_ids), now_s)
            request.add_update(choice, update)
            if request.is_over:
                self._leave_queue(request)
            if choice.finish_reason is not None:
                metrics.choice_finished(
                    request.request_id,
                    choice.finish_reason,
                    choice.num_prompt_tokens,
                    choice.num_output_tokens,
                    update.timings or NO_TIMINGS,
                )
                del self._choices[choice.seq_id]
            elif choice.is_stopped and not was_stopped:
                stopped.append(choice.seq_id)
        return stopped, num_started

    def fail_all(self, error: ApiError) -> None:
        """The engine is gone, and what it worked on with it."""
        lost = self._choices.values()
        self.metrics.sequences_ended("error", len(lost) + len(self._leaving))
        self.metrics.wasted("failed", sum(choice.num_output_tokens for choice in lost))
        self._choices.clear()
        self._leaving.clear()
        self.num_running = 0
        self._prefilling_seq_ids = []
        for request in self.requests:
            request.fail(error)

    def _update_leaving(self, update: SequenceUpdate) -> None:
        """The engine still worked on a sequence that was dropped, or confirms its end."""
        if update.seq_id in self._leaving:
            self.metrics.wasted("cancelled", len(update.token_ids))
            if update.finish_reason is not None:
                self._leaving.remove(update.seq_id)
                self.metrics.sequences_ended(update.finish_reason)

    def _leave_queue(self, request: RequestState) -> bool:
        """It has a token, or is over without one; False if it had left before."""
        if not request.is_queued:
            return False
        request.is_queued = False
        self._num_queued -= 1
        self.queued_tokens -= request.num_prompt_tokens
        return True


def _observe_tokens(metrics: Metrics, choice: ChoiceState, num_tokens: int, now_s: float) -> None:
    if not num_tokens:
        return
    if choice.last_token_s is None:
        metrics.first_token(choice.request.request_id, now_s - choice.request.arrival_s)
    else:
        metrics.next_tokens(now_s - choice.last_token_s, num_tokens)
    choice.last_token_s = now_s
