"""The requests in flight, and what is known of their load.

Requests enter and leave; step reports bring each of their answers what is new. What leaves are sequences
whose stop string came, counts for the queue limit and the gauges, and observations for the metrics.
All on the event loop's thread; nothing here knows HTTP, or how the engine is reached.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from services.core.metrics import Metrics
from services.core.outputs import Answer, LiveRequest
from services.engine.messages import StepReport
from services.errors import Refusal


@dataclass(slots=True)
class InFlight:
    live: set[LiveRequest] = field(default_factory=set)
    _answers: dict[int, Answer] = field(default_factory=dict)
    _num_running: int = 0
    _prefilling_seq_ids: list[int] = field(default_factory=list)
    _num_without_token: int = 0
    waiting_tokens: int = 0
    """Prompt tokens of the requests that have no token yet."""

    @property
    def num_waiting(self) -> int:
        """Requests without a token, less those of which a prompt is being computed."""
        computed = [answer for i in self._prefilling_seq_ids if (answer := self._answers.get(i))]
        return self._num_without_token - len({id(a.live) for a in computed if a.live.is_queued})

    @property
    def queue_depth(self) -> int:
        """Prompts without a place in the batch, those on their way to the engine included."""
        return max(0, len(self._answers) - self._num_running)

    def add(self, live: LiveRequest) -> None:
        self.live.add(live)
        live.is_queued = True
        self._num_without_token += 1
        self.waiting_tokens += live.num_prompt_tokens
        for answer in live.answers:
            self._answers[answer.seq_id] = answer

    def drop(self, live: LiveRequest) -> list[int]:
        """Take no more updates for it; returns the sequences that the engine may still work on."""
        self._leave_queue(live)
        return [a.seq_id for a in live.answers if self._answers.pop(a.seq_id, None) and a.ending is None]

    def take(self, report: StepReport, metrics: Metrics) -> tuple[list[int], int]:
        """Bring each update to its request; sequences that nobody waits for any more are passed over.

        Returns the sequences whose stop string just came, and how many requests got their first token.
        """
        self._num_running = report.num_running
        self._prefilling_seq_ids = report.prefilling_seq_ids
        record = report.record
        now_s = 0.0 if record is None else record.start_s + record.duration_s
        stopped: list[int] = []
        num_started = 0
        for update in report.updates:
            answer = self._answers.get(update.seq_id)
            if answer is None:
                continue
            live, was_stopped = answer.live, answer.stopped
            if update.token_ids and self._leave_queue(live):
                num_started += 1
            if not was_stopped:
                _book_tokens(metrics, answer, len(update.token_ids), now_s)
            live.take(answer, update)
            if live.is_over:
                self._leave_queue(live)
            if answer.ending is not None:
                metrics.answer_ended(answer.ending.timings)
                del self._answers[answer.seq_id]
            elif answer.stopped and not was_stopped:
                stopped.append(answer.seq_id)
        return stopped, num_started

    def lose(self, refusal: Refusal) -> None:
        """The engine is gone, and what it worked on with it."""
        self._answers.clear()
        self._num_running = 0
        self._prefilling_seq_ids = []
        for live in self.live:
            live.fail(refusal)

    def _leave_queue(self, live: LiveRequest) -> bool:
        """It has a token, or is over without one; False if it had left before."""
        if not live.is_queued:
            return False
        live.is_queued = False
        self._num_without_token -= 1
        self.waiting_tokens -= live.num_prompt_tokens
        return True


def _book_tokens(metrics: Metrics, answer: Answer, num_tokens: int, now_s: float) -> None:
    if not num_tokens:
        return
    if answer.last_token_s is None:
        metrics.first_token(now_s - answer.live.arrival_s)
    else:
        metrics.next_tokens(now_s - answer.last_token_s, num_tokens)
    answer.last_token_s = now_s
