"""The step loop: take messages, schedule a step, let the backend compute it, publish what came of it.

One loop serves every backend. An `OverlappingBackend` computes while its caller goes on, so each step is
launched before the result of the one before is asked for, and the device never waits for the host. A sequence
that arrives meanwhile joins one step later. Any other backend computes within the launch; its result is there
at once and is collected in the same turn.

`run` serves an inbox and blocks its thread. A simulator calls `handle` and `step` instead, with a clock and a
backend of its own: the backend moves the clock by what a step costs, and `step` says when to come back.

A step that a `BackendError` keeps from starting is tried once more, a sequence at a time, so that only the
sequences at fault end; one whose result fails ends its sequences and nothing else. Any other exception leaves
the loop: the state of the model is then unknown, and whoever started the engine starts a new one.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq
from dataclasses import replace

from adapters.base import (
    Backend,
    BackendError,
    BackendWithFigures,
    CapacityError,
    ConfigError,
    OverlappingBackend,
    RequestTooLong,
    ScheduledChunk,
    StepOutput,
)
from services.contract.timings import StepRecord
from services.engine.message_loop import Inbox, run_loop
from services.engine.messages import Cancel, Drain, SequenceUpdate, StepReport, Submit
from services.engine.scheduler import Scheduler, StepPlan
from services.engine.step_plan import contexts

logger = logging.getLogger(__name__)

_GetResult = Callable[[], list[StepOutput]]
"""Waits for the tokens of a step, as `PendingStep.result` does."""
_LaunchedStep = tuple[StepPlan, _GetResult, float]
"""With the time of its launch. A tuple, since one is made each step."""


class Engine:
    """All methods but `busy_s` are called from one thread, and so is `publish`: the next step waits for it.

    `clock` gives seconds; arrivals are stamped on the same clock. `tick_s` is the least time between the
    starts of two steps. `overlap=False` collects each step before the next one is launched, whatever the
    backend can do. Raises ConfigError where the scheduler's batch is larger than the backend's.
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
        self._publish_s = 0.0  # of the step before
        self._num_steps = 0
        self._overlapping = backend if overlap and isinstance(backend, OverlappingBackend) else None
        self._figures = backend.figures if isinstance(backend, BackendWithFigures) else None
        # Steps that may still be computing when a turn ends.
        self._max_in_flight = 0 if self._overlapping is None else 1
        self._in_flight: deque[_LaunchedStep] = deque()

    def run(self, inbox: Inbox) -> None:
        """Serve until `Stop`; sequences that are then unfinished get no further update."""
        run_loop(inbox, self.handle, self.step)
        self._collect(0)

    def handle(self, messages: Iterable[Submit | Cancel | Drain]) -> None:
        """Act on messages, in their order. What ends by them is published in one report without a record."""
        is_between_steps = self._step_began_s is None
        if is_between_steps:
            self._step_began_s = self._clock()
        updates = [update for message in messages for update in self._handle(message)]
        if is_between_steps:
            self._step_began_s = None
        if updates:
            self._publish(self._report(updates, None))

    def step(self) -> float | None:
        """One turn: launch a step if there is one, and publish the steps that are due.

        Returns for how long, in s, the next turn has nothing to do unless a message comes before it: 0 asks
        for a turn at once, None for none before a message.
        """
        if self._in_flight and self._scheduler.needs_tokens:
            self._collect(0)
        num_before = len(self._in_flight)
        idle_s = self._launch_next()
        has_launched = len(self._in_flight) > num_before
        # Where nothing follows, nothing is gained by leaving the last step for later.
        self._collect(self._max_in_flight if has_launched else 0)
        return 0.0 if num_before else idle_s

    def busy_s(self) -> float:
        """How long the present step, or the work on messages between steps, has taken; 0 where neither is.

        The present step is the oldest without a result. It counts from its launch, or from the end of the
        step before if that was later. May be called from any thread.
        """
        began_s = self._step_began_s
        return 0.0 if began_s is None else self._clock() - began_s

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

    def _launch(self, chunks: Seq[ScheduledChunk]) -> _GetResult:
        if self._overlapping is not None:
            return self._overlapping.launch(chunks).result
        outputs = self._backend.step(chunks)
        return lambda: outputs

    def _launch_next(self) -> float | None:
        """Schedule and launch one step; returns for how long there is none, if there is none."""
        start_s = self._clock()
        if start_s < self._next_step_s:
            return self._next_step_s - start_s
        plan = self._scheduler.schedule(start_s)
        if plan.released_seq_ids:
            self._backend.release(plan.released_seq_ids)
        if not plan.chunks:
            return None if plan.recheck_at_s is None else max(0.0, plan.recheck_at_s - start_s)
        if not self._in_flight:
            self._step_began_s = start_s
        self._next_step_s = start_s + self._tick_s
        try:
            get_result = self._launch(plan.chunks)
        except (BackendError, CapacityError) as error:
            self._collect(0)  # its sequences first get the tokens of the step before
            self._try_apart(plan.with_ended_rows_dead(), error, start_s)
            return 0.0
        self._in_flight.append((plan, get_result, start_s))
        if released_seq_ids := self._scheduler.mark_launched(plan):
            self._backend.release(released_seq_ids)
        return 0.0

    def _try_apart(self, plan: StepPlan, error: BackendError | CapacityError, start_s: float) -> None:
        """Compute the live rows of a step that could not start one by one."""
        if len(plan.chunks) == 1:
            self._finish_step(plan, error, start_s)
            return
        what = "step %d of %d sequences failed and is tried with each of them apart: %s"
        logger.error(what, self._num_steps, plan.num_rows, error)
        # A launch is a step of the log, as each of those that follow.
        in_vain = replace(plan, num_rows=0, num_dead_rows=len(plan.chunks), num_decode_tokens=0)
        self._publish_step([], in_vain, start_s, self._clock())
        for part in plan.apart():
            start_s = self._step_began_s = self._clock()
            result: list[StepOutput] | BackendError | CapacityError
            try:
                result = self._backend.step(part.chunks)
                self._backend.release(self._scheduler.mark_launched(part))
            except (BackendError, CapacityError) as its_own:
                result = its_own
            self._finish_step(part, result, start_s)

    def _collect(self, num_left: int) -> None:
        """Wait for the results of launched steps, oldest first, until `num_left` are without one."""
        while len(self._in_flight) > num_left:
            plan, get_result, start_s = self._in_flight[0]
            result: list[StepOutput] | BackendError | CapacityError
            try:
                result = get_result()
            except (BackendError, CapacityError) as error:
                result = error
            self._in_flight.popleft()
            self._finish_step(plan, result, start_s)

    def _finish_step(
        self, plan: StepPlan, result: list[StepOutput] | BackendError | CapacityError, start_s: float
    ) -> None:
        """Update the sequences from a step's result, or end them where it failed, and publish."""
        done_s = self._clock()
        if self._max_in_flight:
            # Messages and the step before may have ended some of its sequences since it was launched.
            plan = plan.with_ended_rows_dead()
        if isinstance(result, list):
            outcome = self._scheduler.update_from_output(plan, result, done_s)
        else:
            logger.error(
                "step %d failed and ends its %d sequences", self._num_steps, plan.num_rows, exc_info=result
            )
            outcome = self._scheduler.mark_failed(plan, f"the backend failed: {result}", done_s)
        self._publish_step(outcome.updates, plan, start_s, done_s)
        self._backend.release(outcome.released_seq_ids)

    def _publish_step(
        self, updates: list[SequenceUpdate], plan: StepPlan, start_s: float, done_s: float
    ) -> None:
        # The device computes one step at a time, however early it was launched.
        start_s = max(start_s, self._done_s)
        self._done_s = done_s
        self._step_began_s = done_s if self._in_flight else None
        report = self._report(updates, self._record(plan, start_s, done_s))
        began_s = self._clock()
        self._publish(report)
        self._publish_s = self._clock() - began_s

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
            **contexts(plan.chunks),
            num_preempted=plan.num_preempted,
            num_looked_up_tokens=plan.num_looked_up_tokens,
            num_cached_tokens=plan.num_cached_tokens,
            publish_s=self._publish_s,
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
            None if record is None or self._figures is None else self._figures(),
        )
