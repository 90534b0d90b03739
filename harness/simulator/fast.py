"""A replica whose turn takes all equal steps up to the next event, or one step that the scheduler plans.

The scheduler is the engine's; the turn is written out here without the engine, whose reports and messages a
simulation has no reader for. A message that comes in the middle of equal steps cuts them at the next step,
which is where the engine would see it.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from itertools import accumulate, chain, repeat

from adapters.base import Sequence
from harness.simulator.costs import StepWork
from harness.simulator.repeating import Ahead, RepeatingScheduler
from harness.simulator.replica import Replica


@dataclass(slots=True)
class _Run:
    """Steps ahead: `instants_s` has the start and the end of each, and the start of the step after them.

    Where rows end with that step, its end follows, and `next_s` is when the turn after it is.
    """

    ahead: Ahead
    instants_s: list[float]
    next_s: float | None


class FastReplica(Replica):
    makes_scheduler = RepeatingScheduler
    scheduler: RepeatingScheduler

    def _prepare(self) -> None:
        self._run: _Run | None = None

    def fail(self, now_s: float) -> None:
        if self._run is not None:
            self._take_run(self._run, now_s, is_cut=True)
        super().fail(now_s)

    def _wake(self, at_s: float) -> None:
        if self._run is None:
            super()._wake(at_s)
        elif self.wakes_at_s is not None and at_s < self.wakes_at_s:
            instants_s = self._run.instants_s
            place = bisect_left(instants_s, at_s)
            self.wakes_at_s = instants_s[place + place % 2]

    def _act(self, now_s: float, due: list[list[Sequence]]) -> None:
        run, scheduler, spec = self._run, self.scheduler, self._spec
        if run is not None and self._take_run(run, now_s, is_cut=bool(due)):
            assert run.next_s is not None
            self._begin_run(run.next_s)
            return
        for sequences in due:
            scheduler.add(sequences)
        plan = scheduler.schedule(now_s)
        num_rows = plan.num_rows + plan.num_dead_rows
        self._is_between_steps = num_rows > 0
        if not num_rows:
            recheck_at_s = plan.recheck_at_s
            self.wakes_at_s = None if recheck_at_s is None else now_s + max(0.0, recheck_at_s - now_s)
            return
        work = scheduler.work
        done_s = now_s + spec.cost.step_s(work)
        decoding = scheduler.decoding if spec.on_tokens is not None and plan.num_decode_tokens else []
        updates = scheduler.take(plan, done_s)
        depth = scheduler.queue_depth
        self._saw(work)
        self.steps.add_step(plan, work, depth, now_s, done_s)
        if spec.on_tokens is not None:
            going_on = [seq for seq in decoding if seq.finish_reason is None]
            spec.on_tokens(self, going_on, (done_s,), num_rows)
        spec.on_report(self, updates, num_rows, depth, done_s)
        self._begin_run(done_s + spec.overheads.gap_s(work.rows))

    def _begin_run(self, start_s: float) -> None:
        self.wakes_at_s = start_s
        ahead = self.scheduler.ahead()
        if ahead is None:
            return
        num_live, context, num_steps = ahead.num_live, ahead.context, ahead.num_alike + ahead.has_end
        num_rows = num_live + ahead.num_dead
        costs_s = self._spec.cost.decode_s(num_rows, range(context, context + num_steps * num_live, num_live))
        gaps_s = repeat(self._spec.overheads.gap_s(num_rows))
        # Added up one by one, as the clock of single steps is: to the last bit the same instants.
        parts_s = chain.from_iterable(zip(costs_s, gaps_s))  # noqa: B905 endless
        instants_s = list(accumulate(parts_s, initial=start_s))
        next_s = instants_s.pop() if ahead.has_end else None
        self._run = _Run(ahead, instants_s, next_s)
        self.wakes_at_s = instants_s[2 * ahead.num_alike]

    def _take_run(self, run: _Run, now_s: float, *, is_cut: bool) -> bool:
        """Take the steps of a run that began before `now_s`; whether that with which rows end is taken too.

        It is not where a message comes before it, which makes it another step.
        """
        self._run = None
        spec, scheduler, ahead, instants_s = self._spec, self.scheduler, run.ahead, run.instants_s
        num_steps = (bisect_left(instants_s, now_s) + 1) // 2
        has_end = ahead.has_end and num_steps == ahead.num_alike and not is_cut
        num_taken = num_steps + has_end
        if not num_taken:
            return False
        num_live = ahead.num_live
        num_rows = num_live + ahead.num_dead
        taken_s = instants_s[: 2 * num_taken]
        if spec.on_tokens is not None:
            spec.on_tokens(self, scheduler.decoding, taken_s[1 : 2 * num_steps : 2], num_rows)
        updates = scheduler.take_ahead(num_taken, taken_s[-1])
        depth = scheduler.queue_depth
        self.steps.add_run(num_live, ahead.num_dead, depth, ahead.context, taken_s)
        self._saw(StepWork(num_rows, 0, 0, ahead.context + (num_taken - 1) * num_live, 0))
        if has_end:
            if spec.on_tokens is not None:
                spec.on_tokens(self, scheduler.decoding, taken_s[-1:], num_rows)
            spec.on_report(self, updates, num_rows, depth, taken_s[-1])
        return has_end
