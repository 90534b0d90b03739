"""A scheduler that tells rows apart only where something happens to them.

Between two events a batch of decode rows does the same thing step after step: the same rows, one token each,
nobody joins and nobody ends. Such rows stand in a heap by the step with which they end. They are told what
they have got when they end, or before anybody looks at them. The rule that says how many steps are alike is
here; what a step does is the scheduler's own. Cancelled and exclusive sequences, failed steps and padded
prompts do not occur.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from heapq import heapify, heappop, heappush
from itertools import count
from typing import Any, NamedTuple, overload

from adapters.base import ScheduledChunk, Sequence, SequenceState, StepOutput
from harness.simulator.costs import StepWork, work_of
from services.engine.messages import SequenceUpdate
from services.engine.running_batch import RunningBatch
from services.engine.scheduler import Scheduler, StepPlan
from services.engine.step_plan import chunks_of_prompts

_RUNNING = SequenceState.RUNNING

TOKEN = 0
"""Every token is this one; nothing ends before its budget."""


class Ahead(NamedTuple):
    """The steps to come, if no message comes."""

    num_steps: int
    num_alike: int
    """All of them, or all but the last one: rows end with it."""
    num_live: int
    num_rows: int
    """Dead ones as well."""
    context: int
    """Of the first of these steps; each live row adds one with each step."""


class _Row(NamedTuple):
    """A row that decodes; the one that ends first is the least."""

    ends_with: int
    """The step of decoding with which it ends."""
    number: int
    seq: Sequence
    joined_step: int
    joined_sum_rows: int
    """What the scheduler had counted when it joined."""


class _Told(Seq[Sequence]):
    """The running sequences for a strategy: told as soon as it looks at one, and not where it counts them."""

    def __init__(self, batch: RunningBatch, tell: Callable[[], None]) -> None:
        self._batch = batch
        self._tell = tell

    def __len__(self) -> int:
        return len(self._batch.sequences)

    @overload
    def __getitem__(self, index: int) -> Sequence: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sequence]: ...
    def __getitem__(self, index: int | slice) -> Sequence | list[Sequence]:
        self._tell()
        return self._batch.sequences[index]


class RepeatingScheduler(Scheduler):
    """The scheduler of the engine. `schedule` is followed by `take`; between steps `ahead` may be asked, and
    followed by `take_decoding`.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._told = _Told(self._batch, self._tell_all)
        self._rows: list[_Row] = []
        """Rows that decode, a heap."""
        self._numbers = count()
        self._step = self._sum_rows = 0  # of decoding, and live rows in all steps so far
        self._told_step = self._told_sum_rows = 0  # when all of `_rows` were told last
        self._context = 0  # of `_rows` in their next step
        self.work = StepWork(0, 0, 0, 0, 0)
        """Of the step that `schedule` laid out."""

    @property
    def decoding(self) -> list[Sequence]:
        """The rows that decode."""
        return [row.seq for row in self._rows]

    def schedule(self, now_s: float) -> StepPlan:
        if self._batch.grows or self._note_served is not None:  # memory or the order looks at rows
            self._tell_all()
        return super().schedule(now_s)

    def take(self, plan: StepPlan, done_s: float) -> list[SequenceUpdate]:
        """The step of `plan` is done: every row that was to get a token has got one."""
        updates = []
        if plan.num_decode_tokens:
            updates = self.take_decoding(1, plan.num_rows, done_s)
        if not plan.chunks:
            return updates
        self.mark_launched(plan)
        got = [StepOutput(chunk.seq.seq_id, [TOKEN]) for chunk in plan.chunks if chunk.seq.num_pending_tokens]
        updates += self.update_from_output(plan, got, done_s).updates
        for chunk in plan.chunks:
            seq = chunk.seq
            if seq.state is _RUNNING and seq.num_computed_tokens >= seq.num_prefill_tokens:
                ends_with = self._step + seq.params.max_tokens - len(seq.output_token_ids)
                row = _Row(ends_with, next(self._numbers), seq, self._step, self._sum_rows)
                heappush(self._rows, row)
                self._context += seq.num_computed_tokens + 1
        return updates

    @property
    def _running(self) -> Seq[Sequence]:
        return self._told

    def ahead(self) -> Ahead | None:
        """None where the next step has to be scheduled. A step that needs more KV is never alike."""
        batch, num_live = self._batch, len(self._rows)
        if not num_live or num_live < batch.num_live:
            return None
        if self._waiting:
            if self._preempts_by_priority:
                return None  # with each step those that run hold more that the head of the queue could take
            # A strategy that does not say counts as one that may admit. An order that changes with time
            # arranges the queue at every step in which a slot is free.
            admits = getattr(self._strategy, "admits_while_running", True)
            if batch.has_free_slot and (admits or self._note_served is not None):
                return None
            if self._held_back != self._find_held_back():
                return None  # room came free with the last step: the next one charges another wait
        num_steps = self._rows[0].ends_with - self._step
        num_alike = num_steps - 1
        if batch.grows:
            self._tell_all()
            num_within = min([batch.num_steps_within(row.seq) for row in self._rows])
            if num_within <= num_alike:
                num_steps = num_alike = num_within
        if not num_steps:
            return None
        if not batch.num_dead:
            return Ahead(num_steps, num_alike, num_live, num_live, self._context)
        context = self._context + self._dead_context()
        return Ahead(num_steps, num_alike, num_live, num_live + batch.num_dead, context)

    def _lay_out(self, recheck_at_s: float | None) -> StepPlan:
        """As `lay_out`, with chunks for prompts alone."""
        batch, layout = self._batch, self._layout
        prompts = [
            seq for seq in batch.sequences
            if seq.num_computed_tokens < seq.num_prefill_tokens and seq.state is _RUNNING
        ]  # fmt: skip
        if len(prompts) + len(self._rows) > batch.num_live:
            self._forget_preempted()
        num_decoding, num_dead = len(self._rows), batch.num_dead
        context = self._context + (self._dead_context() if num_dead else 0)
        if prompts and layout.rows_wait:
            num_decoding = num_dead = context = 0
        chunks: list[ScheduledChunk] = []
        if prompts:
            chunks = chunks_of_prompts(
                layout, self.limits, prompts,
                num_rows=num_decoding + num_dead, others_wait=num_decoding > 0,
            )  # fmt: skip
        self.work = work_of(chunks, num_decoding + num_dead, context)
        num_rows = num_decoding + len(chunks)
        return StepPlan(chunks, num_rows, num_dead, self.work.prompt_tokens, num_decoding, recheck_at_s)

    def take_decoding(self, num_steps: int, num_rows: int, done_s: float) -> list[SequenceUpdate]:
        """The rows that decode take so many steps of `num_rows` live rows each; the last one is done then.

        Those that end with it leave.
        """
        rows = self._rows
        self._step += num_steps
        self._sum_rows += num_steps * num_rows
        self._context += num_steps * len(rows)
        if not rows or rows[0].ends_with > self._step:
            return []
        ending: list[Sequence] = []
        while rows and rows[0].ends_with == self._step:
            row = heappop(rows)
            self._tell(row)
            self._context -= row.seq.num_computed_tokens + 1
            ending.append(row.seq)
        if len(ending) > 1:
            ending.sort(key=self._batch.sequences.index)  # as updates of a step stand
        updates = [self._end(seq, [TOKEN], "length", done_s) for seq in ending]
        self._batch.sweep()
        return updates

    def _tell_all(self) -> None:
        if self._told_step < self._step:
            for row in self._rows:
                self._tell(row)
            self._told_step, self._told_sum_rows = self._step, self._sum_rows

    def _tell(self, row: _Row) -> None:
        """Give a row the tokens that it has got since it was told last."""
        seq = row.seq
        num_steps = self._step - max(row.joined_step, self._told_step)
        if not num_steps:
            return
        seq.num_computed_tokens += num_steps
        seq.output_token_ids += [TOKEN] * num_steps
        seq.num_steps += num_steps
        seq.sum_batch_rows += self._sum_rows - max(row.joined_sum_rows, self._told_sum_rows)
        if self._note_served is not None:
            self._note_served(seq, num_steps)

    def _forget_preempted(self) -> None:
        self._rows = [row for row in self._rows if row.seq.state is _RUNNING]
        heapify(self._rows)
        self._context = sum(seq.num_computed_tokens + 1 for seq in self.decoding)

    def _dead_context(self) -> int:
        """A dead row computes its last position again."""
        return sum([seq.num_computed_tokens for seq in self._batch.sequences if seq.state is not _RUNNING])
