"""A replica whose turn takes all equal steps up to the next event, or one step that the scheduler plans.

The scheduler is the engine's. The turn is written out here, without the engine: nobody reads its reports. A
message that comes in the middle of equal steps cuts them at the next step, which is where the engine would
see it.
"""

from __future__ import annotations

from bisect import bisect_left
from itertools import accumulate

from adapters.base import Sequence
from harness.simulator.costs import Since
from harness.simulator.repeating import Ahead, RepeatingScheduler
from harness.simulator.replica import Replica


class FastReplica(Replica):
    makes_scheduler = RepeatingScheduler
    scheduler: RepeatingScheduler

    def _prepare(self) -> None:
        self._ahead: Ahead | None = None
        self._instants_s: list[float] = []
        """The start and the end of each step ahead, and the start of the step after them, its end too where
        rows end with it."""
        self._next_s = 0.0
        """Where rows end with it, when the turn after it is."""
        self._since = Since()

    def fail(self, now_s: float) -> None:
        self._take_ahead(now_s, is_cut=True)
        super().fail(now_s)

    def _wake(self, at_s: float) -> None:
        if self._ahead is None:
            super()._wake(at_s)
        elif self.wakes_at_s is not None and at_s < self.wakes_at_s:
            place = bisect_left(self._instants_s, at_s)
            self.wakes_at_s = self._instants_s[place + place % 2]

    def _act(self, now_s: float, due: list[list[Sequence]]) -> None:
        if self._ahead is not None and self._take_ahead(now_s, is_cut=bool(due)):
            self._look_ahead(self._next_s)
            return
        scheduler, spec = self.scheduler, self._spec
        for sequences in due:
            scheduler.add(sequences)
        plan = scheduler.schedule(now_s)
        num_rows = plan.num_rows + plan.num_dead_rows
        is_after_idle = self._is_after_idle(now_s)
        self._is_between_steps = num_rows > 0
        if not num_rows:
            recheck_at_s = plan.recheck_at_s
            self.wakes_at_s = None if recheck_at_s is None else now_s + max(0.0, recheck_at_s - now_s)
            return
        work, on_tokens = scheduler.work, spec.on_tokens
        self._since = self._since.step(work, is_after_idle=is_after_idle)
        self._ended_s = done_s = now_s + spec.cost.step_s(work, self._since)
        decoding = scheduler.decoding if on_tokens is not None and plan.num_decode_tokens else []
        updates = scheduler.take(plan, done_s)
        depth = scheduler.queue_depth
        self._saw(work)
        self.steps.add_step(plan, work, depth, now_s, done_s)
        if on_tokens is not None:
            on_tokens(self, [seq for seq in decoding if seq.finish_reason is None], (done_s,), num_rows)
        spec.on_report(self, updates, num_rows, depth, done_s)
        self._look_ahead(done_s + spec.overheads.gap_s(work.rows))

    def _look_ahead(self, start_s: float) -> None:
        """The next turn is at `start_s`, or as many equal steps later."""
        self.wakes_at_s = start_s
        self._ahead = ahead = self.scheduler.ahead()
        if ahead is None:
            return
        num_steps, num_alike, num_live, num_rows, context = ahead
        parts_s = [self._spec.overheads.gap_s(num_rows)] * (2 * num_steps)
        contexts = range(context, context + num_steps * num_live, num_live)
        parts_s[::2] = self._spec.cost.decode_s(num_rows, contexts, self._since.later(1))
        # Added up one by one, as the clock of single steps is: to the last bit the same instants.
        self._instants_s = instants_s = list(accumulate(parts_s, initial=start_s))
        if num_steps > num_alike:
            self._next_s = instants_s.pop()
        self.wakes_at_s = instants_s[2 * num_alike]

    def _take_ahead(self, now_s: float, *, is_cut: bool) -> bool:
        """Take the steps ahead that began before `now_s`; whether that with which rows end is taken too.

        It is not where a message comes before it, which makes it another step.
        """
        ahead, self._ahead = self._ahead, None
        if ahead is None:
            return False
        num_ahead, num_alike, num_live, num_rows, context = ahead
        num_steps = (bisect_left(self._instants_s, now_s) + 1) // 2
        takes_end = num_ahead > num_steps == num_alike and not is_cut
        num_taken = num_steps + takes_end
        if not num_taken:
            return False
        self._since = self._since.later(num_taken)
        scheduler, on_tokens, most = self.scheduler, self._spec.on_tokens, self.most
        taken_s = self._instants_s[: 2 * num_taken]
        self._ended_s = taken_s[-1]
        if on_tokens is not None and num_steps:
            on_tokens(self, scheduler.decoding, taken_s[1 : 2 * num_steps : 2], num_rows)
        updates = scheduler.take_decoding(num_taken, num_live, taken_s[-1])
        depth = scheduler.queue_depth
        self.steps.add_run(num_live, num_rows - num_live, depth, context, taken_s)
        if num_rows > most[0]:
            most[0] = num_rows
        if (last_context := context + (num_taken - 1) * num_live) > most[3]:
            most[3] = last_context
        if takes_end:
            if on_tokens is not None:
                on_tokens(self, scheduler.decoding, taken_s[-1:], num_rows)
            self._spec.on_report(self, updates, num_rows, depth, taken_s[-1])
        return takes_end
