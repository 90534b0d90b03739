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

from adapters.base import BackendInfo, ScheduledChunk, Sequence, StepOutput
from harness.simulator.costs import CostModel, StepWork, work_of
from harness.simulator.overheads import Overheads
from harness.simulator.repeating import RepeatingScheduler
from services.contract.timings import StepRecord
from services.engine.engine import Engine
from services.engine.messages import StepReport, Submit
from services.engine.spec import EngineSpec
from services.strategies import VARIANTS

TOKEN = 0
"""Every token is this one; nothing ends before its budget."""


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
        self.has_stepped = False

    def step(self, chunks: Seq[ScheduledChunk]) -> list[StepOutput]:
        self.work = work_of(chunks)
        self.has_stepped = True
        self._clock.now_s += self._cost.step_s(self.work)
        return [StepOutput(chunk.seq.seq_id, [TOKEN]) for chunk in chunks if chunk.samples]

    def release(self, seq_ids: Seq[int]) -> None:
        pass

    def close(self) -> None:
        pass


@dataclass(frozen=True, slots=True)
class _Run:
    """Steps that are alike. `starts_s` holds one more: where the step after them starts."""

    live: list[Sequence]
    num_dead: int
    starts_s: list[float]
    ends_s: list[float]
    context: int
    """Of the first of these steps; each live row adds one with each step."""


OnReport = Callable[["Replica", StepReport, float], None]
OnTokens = Callable[["Replica", Seq[Sequence], Seq[float], int], None]
"""Of a run: its live rows, when its steps were done, and how many rows each computed."""


class Replica:
    """`on_report` gets each report with its instant, `on_tokens` what a run of steps gave instead."""

    def __init__(
        self,
        index: int,
        spec: EngineSpec,
        info: BackendInfo,
        cost: CostModel,
        overheads: Overheads,
        *,
        on_report: OnReport,
        on_tokens: OnTokens,
        exact: bool = False,
    ) -> None:
        self.index = index
        self.steps: list[StepRecord] = []
        self.accepts_at_s = 0.0
        """From when on its API is free to take the next request."""
        self._clock = Clock()
        self._cost = cost
        self._overheads = overheads
        self._backend = TimedBackend(info, cost, self._clock)
        strategy = VARIANTS[spec.variant](spec.strategy)
        self.scheduler = RepeatingScheduler(strategy, spec.limits(info), (), spec.policies)
        self._engine = Engine(
            self._backend, self.scheduler, publish=self._published, clock=self._clock, tick_s=spec.tick_s
        )
        self._on_report, self._on_tokens = on_report, on_tokens
        self._is_exact = exact or spec.tick_s > 0
        self._inbox: deque[tuple[float, Submit]] = deque()
        self._run: _Run | None = None
        self._is_between_steps = False  # the next turn follows a step, so that a message has to wait for it
        self.wakes_at_s: float | None = None
        """When its next turn is; None where only a message wakes it."""

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
        if self._run is not None:
            self._finish_run(self._run, now_s)
        clock = self._clock
        clock.now_s = now_s
        inbox, messages = self._inbox, []
        while inbox and inbox[0][0] <= now_s:
            messages.append(inbox.popleft()[1])
        if messages:
            self._engine.handle(messages)
        self._backend.has_stepped = False
        idle_s = self._engine.step()
        self._is_between_steps = self._backend.has_stepped
        if not self._is_between_steps:
            self.wakes_at_s = None if idle_s is None else now_s + idle_s
            return
        self.wakes_at_s = clock.now_s + self._overheads.gap_s(self._backend.work.rows)
        if not self._is_exact and not inbox:
            self._begin_run(self.wakes_at_s)

    def _begin_run(self, start_s: float) -> None:
        num_steps, live = self.scheduler.repeating()
        if num_steps < 1:
            return
        batch = self.scheduler.batch
        num_rows = len(batch)
        # A live row attends to its own position too; a dead one computes its last position again.
        context = len(live) + sum(seq.num_computed_tokens for seq in batch)
        starts, ends, first_context = [start_s], [], context
        gap_s = self._overheads.gap_s(num_rows)
        step_s, uses_contexts = self._cost.step_s, self._cost.uses_contexts
        cost_s = step_s(StepWork(num_rows, 0, 0, context, 0))
        for _ in range(num_steps):
            if uses_contexts:
                cost_s = step_s(StepWork(num_rows, 0, 0, context, 0))
                context += len(live)
            end_s = start_s + cost_s
            ends.append(end_s)
            start_s = end_s + gap_s
            starts.append(start_s)
        self._run = _Run(live, num_rows - len(live), starts, ends, first_context)
        self.wakes_at_s = start_s

    def _finish_run(self, run: _Run, now_s: float) -> None:
        """Take the steps of a run that began before `now_s`."""
        self._run = None
        num_steps = bisect_left(run.starts_s, now_s)
        if not num_steps:
            return
        ends, num_rows = run.ends_s[:num_steps], len(run.live)
        self.scheduler.repeat(run.live, num_steps)
        depth = self.scheduler.queue_depth
        for step, (start_s, end_s) in enumerate(zip(run.starts_s, ends, strict=False)):
            number, context = len(self.steps), run.context + step * num_rows
            took_s = end_s - start_s
            self.steps.append(
                StepRecord(number, start_s, took_s, num_rows, 0, num_rows, run.num_dead, depth, 0, context, 0)
            )
        self._on_tokens(self, run.live, ends, num_rows + run.num_dead)

    def _published(self, report: StepReport) -> None:
        if report.record is not None:
            self.steps.append(replace(report.record, step=len(self.steps)))
        self._on_report(self, report, self._clock.now_s)
