"""One engine on a virtual clock: the real `Engine` and scheduler around a backend that only tells time.

A turn is the engine's own: messages, one step, publish. What the step costs is the cost model's answer, what
passes between two steps is the calibration's. `harness.simulator.fast` has turns of many steps.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace

from adapters.base import BackendInfo, PendingStep, ScheduledChunk, Sequence, StepOutput
from harness.simulator.costs import IDLE_S, CostModel, Since, StepWork, work_of
from harness.simulator.overheads import Overheads
from harness.simulator.repeating import TOKEN
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
        self._work: StepWork | None = None
        self._since = Since()
        self.is_after_idle = False
        """Whether the next step begins after an idle time."""

    def step(self, chunks: Seq[ScheduledChunk]) -> list[StepOutput]:
        self._clock.now_s += self._cost_s(chunks)
        return _outputs(chunks)

    def _cost_s(self, chunks: Seq[ScheduledChunk]) -> float:
        self._work = work = work_of(chunks)
        self._since = self._since.step(work, is_after_idle=self.is_after_idle)
        return self._cost.step_s(work, self._since)

    def take_work(self) -> StepWork | None:
        """Of the last step, for the first who asks."""
        work, self._work = self._work, None
        return work

    def release(self, seq_ids: Seq[int]) -> None:
        pass

    def close(self) -> None:
        pass


def _outputs(chunks: Seq[ScheduledChunk]) -> list[StepOutput]:
    return [StepOutput(chunk.seq.seq_id, [TOKEN]) for chunk in chunks if chunk.samples]


@dataclass(frozen=True, slots=True)
class _Launched:
    clock: Clock
    done_s: float
    outputs: list[StepOutput]

    def result(self) -> list[StepOutput]:
        self.clock.now_s = max(self.clock.now_s, self.done_s)
        return self.outputs


class OverlappingTimedBackend(TimedBackend):
    """A step begins when it is launched, or when the one before is done; only its result moves the clock."""

    _free_at_s = 0.0

    def launch(self, chunks: Seq[ScheduledChunk]) -> PendingStep:
        self._free_at_s = max(self._clock.now_s, self._free_at_s) + self._cost_s(chunks)
        return _Launched(self._clock, self._free_at_s, _outputs(chunks))


OnReport = Callable[["Replica", Seq[SequenceUpdate], int, int, float], None]
"""Of a step: updates, how many rows it had (0: there was none), how many wait now, and when it was done."""
OnTokens = Callable[["Replica", Seq[Sequence], Seq[float], int], None]
"""Of steps whose rows have no update: live rows, when the steps were done, and how many rows each had."""


@dataclass(frozen=True, slots=True)
class ReplicaSpec:
    """`on_tokens` is None where nobody asks for tokens that have no update."""

    engine: EngineSpec
    info: BackendInfo
    cost: CostModel
    overheads: Overheads
    on_report: OnReport
    on_tokens: OnTokens | None


class Replica:
    makes_scheduler: type[Scheduler] = Scheduler

    def __init__(self, index: int, spec: ReplicaSpec, steps: StepLog) -> None:
        self.index = index
        self.steps = steps
        self.accepts_at_s = 0.0
        """From when on its API is free to take the next request."""
        self.wakes_at_s: float | None = None
        """When its next turn is; None where only a message wakes it."""
        self.is_gone = False
        self.most = [0] * len(StepWork._fields)
        """Of each count, over all steps."""
        self._spec = spec
        self._inbox: deque[tuple[float, list[Sequence]]] = deque()
        self._is_between_steps = False  # the next turn follows a step, so that a message has to wait for it
        self._ended_s = -math.inf  # when the last step did
        engine = spec.engine
        strategy = VARIANTS[engine.variant](engine.strategy)
        self.scheduler = self.makes_scheduler(strategy, engine.limits(spec.info), (), engine.policies)
        self._prepare()

    def _prepare(self) -> None:
        spec, self._clock = self._spec, Clock()
        makes_backend = OverlappingTimedBackend if spec.overheads.overlaps else TimedBackend
        self._backend = makes_backend(spec.info, spec.cost, self._clock)
        self._engine = Engine(
            self._backend,
            self.scheduler,
            publish=self._published,
            clock=self._clock,
            tick_s=spec.engine.tick_s,
        )

    def fail(self, now_s: float) -> None:
        """What it began before this instant is done; it does nothing more."""
        self.is_gone, self.wakes_at_s = True, None

    @property
    def num_sequences(self) -> int:
        """Running and waiting."""
        return self.scheduler.num_running + self.scheduler.queue_depth

    def submit(self, at_s: float, sequences: list[Sequence]) -> float | None:
        """A request is in the engine's inbox from `at_s` on, which is not before those of earlier calls.

        Returns when the next turn is, where this brings it forward.
        """
        self._inbox.append((at_s, sequences))
        planned_s = self.wakes_at_s
        self._wake(at_s)
        return None if self.wakes_at_s == planned_s else self.wakes_at_s

    def turn(self, now_s: float) -> None:
        """Messages and what follows from them, and from it the instant of the next turn."""
        inbox, due = self._inbox, []
        while inbox and inbox[0][0] <= now_s:
            due.append(inbox.popleft()[1])
        self._act(now_s, due)
        if inbox:
            self._wake(inbox[0][0])

    def _is_after_idle(self, now_s: float) -> bool:
        return not self._is_between_steps and now_s - self._ended_s >= IDLE_S

    def _wake(self, at_s: float) -> None:
        if self.wakes_at_s is None or (at_s < self.wakes_at_s and not self._is_between_steps):
            self.wakes_at_s = at_s

    def _act(self, now_s: float, due: list[list[Sequence]]) -> None:
        clock, backend = self._clock, self._backend
        clock.now_s = now_s
        if due:
            self._engine.handle([Submit(sequences) for sequences in due])
        backend.is_after_idle = self._is_after_idle(now_s)
        idle_s = self._engine.step()
        work = backend.take_work()
        # A turn that waited for the step before read no message meanwhile.
        self._is_between_steps = work is not None or clock.now_s > now_s
        if self._is_between_steps:
            self._ended_s = clock.now_s
        if work is None:
            self.wakes_at_s = None if idle_s is None else clock.now_s + idle_s
        else:
            self._saw(work)
            self.wakes_at_s = clock.now_s + self._spec.overheads.gap_s(work.rows)

    def _saw(self, work: StepWork) -> None:
        self.most = list(map(max, self.most, work))

    def _published(self, report: StepReport) -> None:
        record, num_rows = report.record, 0
        if record is not None:
            self.steps.add(record)
            num_rows = record.num_rows + record.num_dead_rows
        self._spec.on_report(self, report.updates, num_rows, report.queue_depth, self._clock.now_s)
