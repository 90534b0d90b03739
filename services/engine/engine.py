"""The step loop: take messages, plan, let the backend compute, publish.

Messages enter through an `Inbox`; one `StepReport` a step leaves through `publish`. This is the one place
that reads the clock for steps; arrivals are stamped by the API on the same system-wide monotonic clock.
It does not know which strategy runs, which backend computes or whether the API is another process.

Where the backend computes while its caller plans (`OverlappingBackend`), each step is launched before the
result of the one before is asked for, so that the device finds its next work when it is done. Who arrives
meanwhile finds one step more launched already. A step that cannot be planned without the tokens of the one
before waits for them, and so does the loop before it waits for messages.

A `BackendError` in a step ends the sequences of that step and nothing else. Any other exception leaves
`run`: the state of the model is then unknown, and whoever started the engine starts a new one.
"""

from __future__ import annotations

import logging
import math
import queue
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from adapters.base import (
    Backend,
    BackendError,
    CapacityError,
    ConfigError,
    OverlappingBackend,
    PendingStep,
    RequestTooLong,
    StepOutput,
)
from services.contract.timings import StepRecord
from services.engine.messages import Cancel, Drain, SequenceUpdate, StepReport, Stop, Submit
from services.engine.scheduler import Outcome, Scheduler, StepPlan

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


@dataclass(frozen=True, slots=True)
class _NeverStarted:
    """Stands for a step that could not be launched: its result is the error."""

    error: BackendError | CapacityError

    def result(self) -> list[StepOutput]:
        raise self.error


@dataclass(frozen=True, slots=True)
class _Launched:
    plan: StepPlan
    pending: PendingStep
    start_s: float


class Engine:
    """Runs in one thread. `publish` is called from it and should be quick: the next step waits for it.

    `tick_s` is the least time between the starts of two steps; a step is not launched ahead of it.
    `overlap=False` takes one step after the other even where the backend could do better. Raises
    ConfigError where the scheduler's batch is larger than the backend's.
    """

    def __init__(
        self,
        backend: Backend,
        scheduler: Scheduler,
        *,
        publish: Callable[[StepReport], None],
        clock: Callable[[], float] = time.monotonic,
        tick_s: float = 0.0,
        overlap: bool = True,
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
        self._done_s = -math.inf
        self._num_steps = 0
        self._launch = backend.launch if overlap and isinstance(backend, OverlappingBackend) else None
        self._flying: deque[_Launched] = deque()

    def run(self, inbox: Inbox) -> None:
        """Serve until `Stop`; sequences that are then unfinished get no further update."""
        turn = self._turn if self._launch is None else self._overlapped_turn
        idle_s: float | None = 0.0
        while self._take_messages(inbox, idle_s):
            idle_s = turn()
        self._collect(0)

    def busy_s(self) -> float:
        """How long the present step has been computing; 0 between steps. May be called from any thread.

        The present one is the oldest without a result, from its launch on or from the end of the one before.
        """
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
            return self._abandon(plan, error)
        done_s = self._clock()
        return self._scheduler.commit(plan, outputs, done_s), done_s

    def _abandon(self, plan: StepPlan, error: Exception) -> tuple[Outcome, float]:
        logger.error(
            "step %d failed and ends its %d sequences", self._num_steps, plan.num_rows, exc_info=error
        )
        done_s = self._clock()
        return self._scheduler.abandon(plan, f"the backend failed: {error}", done_s), done_s

    def _overlapped_turn(self) -> float | None:
        """Launch a step if there is one, then collect the one before; returns as `_turn` does."""
        if self._flying and self._scheduler.needs_tokens:
            self._collect(0)
        num_flying = len(self._flying)
        idle_s = self._launch_next()
        has_launched = len(self._flying) > num_flying
        # A step that never started is collected at once: nothing can follow it.
        goes_on = has_launched and not isinstance(self._flying[-1].pending, _NeverStarted)
        self._collect(1 if goes_on else 0)
        return 0.0 if num_flying else idle_s

    def _launch_next(self) -> float | None:
        """Plan and launch one step; returns for how long there is nothing to do unless a result comes."""
        assert self._launch is not None
        start_s = self._clock()
        if start_s < self._next_step_s:
            return self._next_step_s - start_s
        plan = self._scheduler.plan(start_s)
        if not plan.chunks:
            return None if plan.recheck_at_s is None else max(0.0, plan.recheck_at_s - start_s)
        if not self._flying:
            self._step_began_s = start_s
        self._next_step_s = start_s + self._tick_s
        try:
            pending = self._launch(plan.chunks)
        except (BackendError, CapacityError) as error:
            self._flying.append(_Launched(plan, _NeverStarted(error), start_s))
            return 0.0
        self._flying.append(_Launched(plan, pending, start_s))
        released_seq_ids = self._scheduler.advance(plan)
        if released_seq_ids:
            self._backend.release(released_seq_ids)
        return 0.0

    def _collect(self, num_left: int) -> None:
        """Wait for the results of launched steps, oldest first, until `num_left` are without one."""
        while len(self._flying) > num_left:
            step = self._flying[0]
            plan = step.plan.in_hindsight()
            try:
                outputs = step.pending.result()
            except (BackendError, CapacityError) as error:
                outcome, done_s = self._abandon(plan, error)
            else:
                done_s = self._clock()
                outcome = self._scheduler.settle(plan, outputs, done_s)
            self._flying.popleft()
            start_s = max(step.start_s, self._done_s)
            self._done_s = done_s
            self._step_began_s = done_s if self._flying else None
            self._publish(self._report(outcome.updates, self._record(plan, start_s, done_s)))
            if outcome.released_seq_ids:
                self._backend.release(outcome.released_seq_ids)

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
            scheduler.prefilling_seq_ids(),
        )
