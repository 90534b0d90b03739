"""The step loop: take messages, plan, let the backend compute, publish.

Messages enter through an `Inbox`; one `StepReport` a step leaves through `publish`. This is the one place
that reads the clock for steps; arrivals are stamped by the API on the same system-wide monotonic clock.
It does not know which strategy runs, which backend computes or whether the API is another process.

A `BackendError` in a step ends the sequences of that step and nothing else. Any other exception leaves
`run`: the state of the model is then unknown, and whoever started the engine starts a new one.
"""

from __future__ import annotations

import logging
import math
import queue
import time
from collections.abc import Callable
from typing import Protocol

from adapters.base import Backend, BackendError, CapacityError, ConfigError, RequestTooLong
from services.messages import Cancel, Drain, SequenceUpdate, StepRecord, StepReport, Stop, Submit
from services.scheduler import Outcome, Scheduler, StepPlan

Message = Submit | Cancel | Drain | Stop

logger = logging.getLogger(__name__)


class Inbox(Protocol):
    """Where the engine's messages come from: a queue, a pipe."""

    def get(self, timeout_s: float | None) -> Message | None:
        """The next message, or None if none comes within `timeout_s` (0: do not wait; None: no limit)."""
        ...


class QueueInbox:
    """The inbox of an engine that runs in a thread beside its sender; `put` may be called from any thread."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[Message] = queue.SimpleQueue()

    def put(self, message: Message) -> None:
        self._queue.put(message)

    def get(self, timeout_s: float | None) -> Message | None:
        if timeout_s == 0 and self._queue.empty():
            return None
        try:
            return self._queue.get(timeout=timeout_s)
        except queue.Empty:
            return None


class Engine:
    """Runs in one thread. `publish` is called from it and should be quick: the next step waits for it.

    `tick_s` is the least time between the starts of two steps. Raises ConfigError where the
    scheduler's batch is larger than the backend's.
    """

    def __init__(
        self,
        backend: Backend,
        scheduler: Scheduler,
        *,
        publish: Callable[[StepReport], None],
        clock: Callable[[], float] = time.monotonic,
        tick_s: float = 0.0,
    ) -> None:
        max_batch, max_batch_size = scheduler.limits.max_batch, backend.info.max_batch_size
        if max_batch > max_batch_size:
            raise ConfigError(f"MAX_BATCH is {max_batch}, but the backend has {max_batch_size} slots")
        self._backend = backend
        self._scheduler = scheduler
        self._publish = publish
        self._clock = clock
        self._tick_s = tick_s
        self._next_step_s = -math.inf
        self._step_began_s: float | None = None
        self._num_steps = 0

    def run(self, inbox: Inbox) -> None:
        """Serve until `Stop`; sequences that are then unfinished get no further update."""
        idle_s: float | None = 0.0
        while self._take_messages(inbox, idle_s):
            idle_s = self._turn()

    def busy_s(self) -> float:
        """How long the present step has been computing; 0 between steps. May be called from any thread."""
        began_s = self._step_began_s
        return 0.0 if began_s is None else self._clock() - began_s

    def _take_messages(self, inbox: Inbox, idle_s: float | None) -> bool:
        """Wait up to `idle_s` for a message, act on all there are; False after `Stop`."""
        updates: list[SequenceUpdate] = []
        message = inbox.get(idle_s)
        while message is not None and not isinstance(message, Stop):
            updates += self._handle(message)
            message = inbox.get(0)
        if updates:
            self._publish(self._report(updates, None))
        return message is None

    def _handle(self, message: Submit | Cancel | Drain) -> list[SequenceUpdate]:
        match message:
            case Submit(sequences):
                try:
                    self._scheduler.add(sequences)
                except RequestTooLong as error:
                    return [SequenceUpdate(seq.seq_id, [], "error", error=str(error)) for seq in sequences]
            case Cancel(seq_ids, reason):
                outcome = self._scheduler.cancel(seq_ids, self._clock(), reason)
                self._backend.release(outcome.released_seq_ids)
                return outcome.updates
            case Drain():
                self._scheduler.drain()
        return []

    def _turn(self) -> float | None:
        """Compute one step if there is one; returns for how long the loop may then wait for messages."""
        start_s = self._clock()
        if start_s < self._next_step_s:
            return self._next_step_s - start_s
        plan = self._scheduler.plan(start_s)
        if not plan.chunks:
            return None if plan.recheck_at_s is None else max(0.0, plan.recheck_at_s - start_s)
        self._step_began_s = start_s
        outcome, done_s = self._compute(plan)
        self._step_began_s = None
        self._publish(self._report(outcome.updates, self._record(plan, start_s, done_s)))
        if outcome.released_seq_ids:
            self._backend.release(outcome.released_seq_ids)
        self._next_step_s = start_s + self._tick_s
        return 0.0

    def _compute(self, plan: StepPlan) -> tuple[Outcome, float]:
        try:
            outputs = self._backend.step(plan.chunks)
        except (BackendError, CapacityError) as error:
            logger.exception("step %d failed and ends its %d sequences", self._num_steps, plan.num_rows)
            done_s = self._clock()
            return self._scheduler.abandon(plan, f"the backend failed: {error}", done_s), done_s
        done_s = self._clock()
        return self._scheduler.commit(plan, outputs, done_s), done_s

    def _record(self, plan: StepPlan, start_s: float, done_s: float) -> StepRecord:
        record = StepRecord(
            step=self._num_steps,
            start_s=start_s,
            duration_s=done_s - start_s,
            num_rows=plan.num_rows,
            num_prompt_tokens=plan.num_prompt_tokens,
            num_decode_tokens=plan.num_decode_tokens,
            num_dead_rows=plan.num_dead_rows,
            queue_depth=self._scheduler.queue_depth,
        )
        self._num_steps += 1
        return record

    def _report(self, updates: list[SequenceUpdate], record: StepRecord | None) -> StepReport:
        scheduler = self._scheduler
        return StepReport(
            updates,
            record,
            scheduler.num_running,
            scheduler.queue_depth,
            scheduler.kv_used_tokens,
            scheduler.num_prefilling,
        )
