"""A scheduler that tells rows apart only where something happens to them.

Between two events a batch of decode rows does the same thing step after step: the same rows, one token each,
nobody joins and nobody ends. Such rows stand in a heap by the step with which they end; what they have got
since they were last told is the same for all of them. The rule that says how many steps are alike is here;
what a step does is the scheduler's own. Cancelled and exclusive sequences, failed steps and padded prompts
do not occur.
"""

from __future__ import annotations

from collections.abc import Iterable
from heapq import heapify, heappop, heappush
from itertools import count
from typing import Any, NamedTuple

from adapters.base import ScheduledChunk, Sequence, SequenceState, StepOutput
from harness.simulator.costs import StepWork, work_of
from services.engine.messages import SequenceUpdate
from services.engine.scheduler import Scheduler, StepPlan
from services.engine.step_plan import chunks_of_prompts

_RUNNING = SequenceState.RUNNING

TOKEN = 0
"""Every token is this one; nothing ends before its budget."""


class Ahead(NamedTuple):
    """The steps to come, if no message comes."""

    num_alike: int
    has_end: bool
    """The step after them is alike as well, but for rows that end with it."""
    num_live: int
    num_dead: int
    context: int
    """Of the first of these steps; each live row adds one with each step."""


class RepeatingScheduler(Scheduler):
    """The scheduler of the engine. `schedule` is followed by `take`; between steps `ahead` may be asked, and
    followed by `take_ahead`.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._rows: list[tuple[int, int, Sequence]] = []
        """Rows that decode, and the step that ends each, a heap."""
        self._numbers = count()
        self._step = 0  # of decoding
        self._context = 0  # of `_rows` in their next step
        self._num_untold = self._num_untold_rows = 0  # steps of which `_rows` know nothing, and rows in them
        self.work = StepWork(0, 0, 0, 0, 0)
        """Of the step that `schedule` laid out."""

    @property
    def decoding(self) -> list[Sequence]:
        """The rows that decode."""
        return [seq for _, _, seq in self._rows]

    def schedule(self, now_s: float) -> StepPlan:
        self._tell_all()
        return super().schedule(now_s)

    def take(self, plan: StepPlan, done_s: float) -> list[SequenceUpdate]:
        """The step of `plan` is done: every row that was to get a token has got one."""
        updates = []
        if plan.num_decode_tokens:
            updates = self._take_decoding(1, plan.num_rows, done_s)
        if not plan.chunks:
            return updates
        self.mark_launched(plan)
        got = [StepOutput(chunk.seq.seq_id, [TOKEN]) for chunk in plan.chunks if chunk.seq.num_pending_tokens]
        updates += self.update_from_output(plan, got, done_s).updates
        self._tell_all()
        for chunk in plan.chunks:
            seq = chunk.seq
            if seq.state is _RUNNING and seq.num_computed_tokens >= seq.num_prefill_tokens:
                ends_with = self._step + seq.params.max_tokens - len(seq.output_token_ids)
                heappush(self._rows, (ends_with, next(self._numbers), seq))
                self._context += seq.num_computed_tokens + 1
        return updates

    def ahead(self) -> Ahead | None:
        """None where the next step has to be scheduled. A step that needs more KV is never alike."""
        batch, num_live = self._batch, len(self._rows)
        if not num_live or num_live < batch.num_live:
            return None
        if self._waiting:
            # A strategy that does not say counts as one that may admit. An order that changes with time
            # arranges the queue at every step in which a slot is free.
            admits = getattr(self._strategy, "admits_while_running", True)
            if batch.has_free_slot and (admits or self._note_served is not None):
                return None
            if self._held_back != self._find_held_back():
                return None  # room came free with the last step: the next one charges another wait
        num_alike, has_end = self._rows[0][0] - self._step - 1, True
        if batch.grows:
            self._tell_all()
            num_within = min([batch.num_steps_within(seq) for _, _, seq in self._rows])
            if num_within <= num_alike:
                num_alike, has_end = num_within, False
        if not num_alike and not has_end:
            return None
        return Ahead(num_alike, has_end, num_live, batch.num_dead, self._context + self._dead_context())

    def take_ahead(self, num_steps: int, done_s: float) -> list[SequenceUpdate]:
        """Take that many steps of `ahead`. `done_s` is when the last one is done."""
        return self._take_decoding(num_steps, len(self._rows), done_s)

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
        context = self._context + self._dead_context()
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

    def _take_decoding(self, num_steps: int, num_rows: int, done_s: float) -> list[SequenceUpdate]:
        """`_rows` took these steps, each of `num_rows` live rows; those that end with the last one leave."""
        rows = self._rows
        self._step += num_steps
        self._num_untold += num_steps
        self._num_untold_rows += num_steps * num_rows
        self._context += num_steps * len(rows)
        if not rows or rows[0][0] > self._step:
            return []
        ending: list[Sequence] = []
        while rows and rows[0][0] == self._step:
            ending.append(heappop(rows)[2])
        if len(ending) > 1:
            ending.sort(key=self._batch.sequences.index)  # as updates of a step stand
        self._tell(ending)
        for seq in ending:
            self._context -= seq.num_computed_tokens + 1
        updates = [self._end(seq, [TOKEN], "length", done_s) for seq in ending]
        self._batch.sweep()
        return updates

    def _tell_all(self) -> None:
        if self._num_untold:
            self._tell(self.decoding)
            self._num_untold = self._num_untold_rows = 0

    def _tell(self, sequences: Iterable[Sequence]) -> None:
        """Give rows the tokens that they have got since `_rows` were told."""
        num_steps, num_rows, note_served = self._num_untold, self._num_untold_rows, self._note_served
        tokens = [TOKEN] * num_steps
        for seq in sequences:
            seq.num_computed_tokens += num_steps
            seq.output_token_ids += tokens
            seq.num_steps += num_steps
            seq.sum_batch_rows += num_rows
            if note_served is not None:
                note_served(seq, num_steps)

    def _forget_preempted(self) -> None:
        self._rows = [row for row in self._rows if row[2].state is _RUNNING]
        heapify(self._rows)
        self._context = sum(seq.num_computed_tokens + 1 for seq in self.decoding)

    def _dead_context(self) -> int:
        """A dead row computes its last position again."""
        if not self._batch.num_dead:
            return 0
        return sum([seq.num_computed_tokens for seq in self._batch.sequences if seq.state is not _RUNNING])
