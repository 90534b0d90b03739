"""One engine on a virtual clock: the real `Engine` and scheduler around a backend that only tells time.

A turn is the engine's own: messages, one step, publish. What the step costs is the cost model's answer, what
passes between two steps is the calibration's. With `exact` false a run of steps that are all alike is one
event; a message that comes in its middle cuts it at the next step, which is where the engine would see it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from itertools import accumulate, chain, repeat
from typing import NamedTuple

from adapters.base import BackendInfo, ScheduledChunk, Sequence, StepOutput
from harness.simulator.costs import CostModel, StepWork, work_of
from harness.simulator.overheads import Overheads
from harness.simulator.repeating import TOKEN, RepeatingScheduler
from harness.simulator.step_log import StepLog
from services.engine.engine import Engine
from services.engine.messages import SequenceUpdate, StepReport, Submit
from services.engine.scheduler import Scheduler
from services.engine.spec import EngineSpec
from services.strategies import VARIANTS


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


class TimedBackend:
    """A backend whose step moves the clock by what the cost model says, and gives a token to each row."""

    def __init__(self, info: BackendInfo, cost: CostModel, clock: Clock) -> None:
        # Without ends of text every answer runs to its budget, as the harness asks for.
        self.info = replace(info, eos_token_ids=())
        self._cost = cost
        self._clock = clock
        self.work = StepWork(0, 0, 0, 0, 0)
        self.most = list(self.work)
        """Of each count, over all steps."""
        self.has_stepped = False
        self.is_asked_for_nothing = False
        """Its scheduler knows which tokens come, so that none has to be told."""

    def step(self, chunks: Seq[ScheduledChunk]) -> list[StepOutput]:
        self.work = work_of(chunks)
        self.saw(self.work)
        self.has_stepped = True
        self._clock.now_s += self._cost.step_s(self.work)
        if self.is_asked_for_nothing:
            return []
        return [StepOutput(chunk.seq.seq_id, [TOKEN]) for chunk in chunks if chunk.samples]

    def saw(self, work: StepWork) -> None:
        self.most = list(map(max, self.most, work))

    def release(self, seq_ids: Seq[int]) -> None:
        pass

    def close(self) -> None:
        pass


@dataclass(slots=True)
class _Run:
    """Steps that are alike, and the start of the step after them, in `starts_s`.

    Where rows end with that step, and nothing else is new in it, `ends_s` has its end, and `next_s` is when
    the turn after it is.
    """

    live: list[Sequence]
    num_dead: int
    starts_s: list[float]
    ends_s: list[float]
    context: int
    """Of the first of these steps; each live row adds one with each step."""
    next_s: float | None


OnReport = Callable[["Replica", Seq[SequenceUpdate], int, int, float], None]
"""Of a step: updates, how many rows it had (0: there was none), how many wait now, and when it was done."""
OnTokens = Callable[["Replica", Seq[Sequence], Seq[float], int], None]
"""Of steps whose rows have no update: live rows, when the steps were done, and how many rows each had."""


class Replica:
    """`on_report` gets what a step gave, `on_tokens`, unless it is None, the tokens that have no update."""

    def __init__(
        self,
        index: int,
        spec: EngineSpec,
        info: BackendInfo,
        cost: CostModel,
        overheads: Overheads,
        steps: StepLog,
        *,
        on_report: OnReport,
        on_tokens: OnTokens | None,
        exact: bool = False,
    ) -> None:
        self.index = index
        self.steps = steps
        self.accepts_at_s = 0.0
        """From when on its API is free to take the next request."""
        self._clock = Clock()
        self._cost = cost
        self._overheads = overheads
        self.backend = TimedBackend(info, cost, self._clock)
        strategy = VARIANTS[spec.variant](spec.strategy)
        is_exact = exact or spec.tick_s > 0
        self.scheduler: Scheduler = (Scheduler if is_exact else RepeatingScheduler)(
            strategy, spec.limits(info), (), spec.policies
        )
        # None in the exact mode: every step is the engine's then.
        self._repeating = self.scheduler if isinstance(self.scheduler, RepeatingScheduler) else None
        self.backend.is_asked_for_nothing = self._repeating is not None
        self._engine = Engine(
            self.backend, self.scheduler, publish=self._published, clock=self._clock, tick_s=spec.tick_s
        )
        self._on_report, self._on_tokens = on_report, on_tokens
        self._inbox: deque[tuple[float, Submit]] = deque()
        self._run: _Run | None = None
        self._is_between_steps = False  # the next turn follows a step, so that a message has to wait for it
        self.wakes_at_s: float | None = None
        """When its next turn is; None where only a message wakes it."""
        self.is_gone = False

    def fail(self, now_s: float) -> None:
        """What it began before this instant is done; it does nothing more."""
        if self._run is not None:
            self._take_run(self._run, now_s, is_cut=True)
        self.is_gone, self.wakes_at_s = True, None

    @property
    def num_sequences(self) -> int:
        """Running and waiting."""
        return self.scheduler.num_running + self.scheduler.queue_depth

    def submit(self, at_s: float, sequences: list[Sequence]) -> None:
        """A request is in the engine's inbox from `at_s` on; may bring the next turn forward."""
        self._inbox.append((at_s, Submit(sequences)))
        run = self._run
        if run is not None:
            assert self.wakes_at_s is not None
            self.wakes_at_s = min(self.wakes_at_s, run.starts_s[bisect_left(run.starts_s, at_s)])
        elif self.wakes_at_s is None or not self._is_between_steps:
            self.wakes_at_s = max(at_s, self._clock.now_s)

    def turn(self, now_s: float) -> None:
        """The engine's turn at `now_s`, and from it the instant of the next one."""
        clock, run = self._clock, self._run
        clock.now_s = now_s
        inbox, messages = self._inbox, []
        while inbox and inbox[0][0] <= now_s:
            messages.append(inbox.popleft()[1])
        if run is not None and self._take_run(run, now_s, is_cut=bool(messages)):
            assert run.next_s is not None
            self.wakes_at_s = run.next_s
            if not inbox:
                self._begin_run(run.next_s)
            return
        if messages:
            self._engine.handle(messages)
        self.backend.has_stepped = False
        idle_s = self._engine.step()
        self._is_between_steps = self.backend.has_stepped
        if not self._is_between_steps:
            self.wakes_at_s = None if idle_s is None else now_s + idle_s
            return
        self.wakes_at_s = clock.now_s + self._overheads.gap_s(self.backend.work.rows)
        if not inbox:
            self._begin_run(self.wakes_at_s)

    def _begin_run(self, start_s: float) -> None:
        scheduler = self._repeating
        if scheduler is None:
            return
        num_alike, has_end, live = scheduler.repeating()
        num_steps = num_alike + has_end
        if num_steps < 1:
            return
        batch = scheduler.batch
        num_rows, num_live = len(batch), len(live)
        # A live row attends to its own position too; a dead one computes its last position again.
        context = num_live + sum([seq.num_computed_tokens for seq in batch])
        costs_s = self._cost.decode_s(num_rows, range(context, context + num_steps * num_live, num_live))
        gaps_s = repeat(self._overheads.gap_s(num_rows))
        # Added up one by one, as the clock of single steps is: to the last bit the same instants.
        parts_s = chain.from_iterable(zip(costs_s, gaps_s))  # noqa: B905 endless
        instants_s = list(accumulate(parts_s, initial=start_s))
        next_s = instants_s.pop() if has_end else None
        self._run = _Run(live, num_rows - num_live, instants_s[::2], instants_s[1::2], context, next_s)
        self.wakes_at_s = self._run.starts_s[-1]

    def _take_run(self, run: _Run, now_s: float, *, is_cut: bool) -> bool:
        """Take the steps of a run that began before `now_s`; whether that with which rows end is taken too.

        It is not where a message comes before it, which makes it another step.
        """
        assert self._repeating is not None
        self._run = None
        num_steps = bisect_left(run.starts_s, now_s)
        has_end = num_steps == len(run.starts_s) - 1 and run.next_s is not None and not is_cut
        num_taken = num_steps + has_end
        if not num_taken:
            return False
        starts_s, ends_s = run.starts_s[:num_taken], run.ends_s[:num_taken]
        num_rows, num_live = len(run.live) + run.num_dead, len(run.live)
        updates: list[SequenceUpdate] = []
        if has_end:
            self._clock.now_s = ends_s[-1]
            updates = self._repeating.end(run.live, num_steps, ends_s[-1]).updates
        else:
            self._repeating.repeat(run.live, num_steps, num_live)
        depth = self.scheduler.queue_depth
        self.steps.add_run(num_live, run.num_dead, depth, run.context, starts_s, ends_s)
        self.backend.saw(StepWork(num_rows, 0, 0, run.context + (num_taken - 1) * num_live, 0))
        if self._on_tokens is not None:
            self._on_tokens(self, run.live, ends_s[:num_steps], num_rows)
            if has_end:
                self._on_tokens(self, self._repeating.plain, ends_s[-1:], num_rows)
        if updates:
            self._on_report(self, updates, num_rows, depth, ends_s[-1])
        return has_end

    def _published(self, report: StepReport) -> None:
        record, now_s, num_rows = report.record, self._clock.now_s, 0
        if record is not None:
            self.steps.add(record)
            num_rows = record.num_rows + record.num_dead_rows
            if self._repeating is not None and self._on_tokens is not None:
                self._on_tokens(self, self._repeating.plain, (now_s,), num_rows)
        self._on_report(self, report.updates, num_rows, report.queue_depth, now_s)


class Submission(NamedTuple):
    replica: Replica
    sequences: list[Sequence]
    """Of one HTTP request."""
