"""A scheduler that can tell how often its last step repeats itself, and take these steps at once.

Between two events a batch of decode rows does the same thing step after step: the same rows, one token each,
nobody joins and nobody ends. The rule that says when is here; what a step does is the scheduler's own.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Seq

from adapters.base import ScheduledChunk, Sequence, SequenceState, StepOutput
from services.engine.scheduler import Outcome, Scheduler, StepPlan

_RUNNING = SequenceState.RUNNING

TOKEN = 0
"""Every token is this one; nothing ends before its budget."""


def _outputs(sequences: Iterable[Sequence]) -> list[StepOutput]:
    return [StepOutput(seq.seq_id, [TOKEN]) for seq in sequences]


class RepeatingScheduler(Scheduler):
    """The scheduler of the engine, with a question and two answers more. Call them between steps only.

    In any step most rows only get their next token. They are told apart, in `plain`, and have no update.
    """

    plain: Seq[Sequence] = ()
    """Of the last step, those that decoded and did not end."""

    @property
    def batch(self) -> list[Sequence]:
        """All that have a slot, dead rows included; not to be changed."""
        return self._batch.sequences

    def repeating(self) -> tuple[int, bool, list[Sequence]]:
        """How many of the next steps are alike, if no message comes; whether the one after them is as well,
        but for those that end with it (`end`); and their live rows.

        A step that needs more KV is none of them.
        """
        none: list[Sequence] = []
        batch, strategy = self._batch, self._strategy
        if self._alone or not batch.num_live:
            return 0, False, none
        # A strategy that does not say counts as one that may admit. An order that changes with time arranges
        # the queue at every step in which a slot is free.
        may_change = getattr(strategy, "admits_while_running", True) or self._note_served is not None
        if self._waiting:
            if batch.has_free_slot and may_change:
                return 0, False, none
            if self._held_back != self._find_held_back():
                return 0, False, none  # room came free with the last step: the next one charges another wait
        before_end = within_kv = 1 << 60
        live = []
        for seq in batch.sequences:
            if seq.state is not _RUNNING:
                continue
            if seq.num_computed_tokens < seq.num_prefill_tokens:
                return 0, False, none
            live.append(seq)
            left, room = seq.params.max_tokens - len(seq.output_token_ids) - 1, batch.num_steps_within(seq)
            if left < before_end:
                before_end = left
            if room < within_kv:
                within_kv = room
        return min(before_end, within_kv), before_end < within_kv, live

    def repeat(self, live: Seq[Sequence], num_steps: int, num_rows: int) -> None:
        """Give `live` the tokens of `num_steps` steps of `repeating`, each of `num_rows` live rows."""
        for seq in live:
            seq.num_computed_tokens += num_steps
        self._give(live, num_steps, num_rows)

    def end(self, live: list[Sequence], num_steps: int, done_s: float) -> Outcome:
        """Take them, and the step after them, with which some of `live` end; the others become `plain`."""
        num_rows = len(live)
        ending: list[Sequence] = []
        plain: list[Sequence] = []
        for seq in live:
            is_last = len(seq.output_token_ids) + num_steps + 1 >= seq.params.max_tokens
            (ending if is_last else plain).append(seq)
        self.repeat(ending, num_steps, num_rows)
        self.repeat(plain, num_steps + 1, num_rows)
        self.plain = plain
        chunks = [ScheduledChunk(seq, seq.num_computed_tokens, 1) for seq in ending]
        plan = StepPlan(chunks, num_rows, 0, 0, num_rows, None)
        self.mark_launched(plan)
        return super().update_from_output(plan, _outputs(ending), done_s)

    def update_from_output(self, plan: StepPlan, outputs: Iterable[StepOutput], now_s: float) -> Outcome:
        """Every row that a step was to give a token has got one, whatever `outputs` tells."""
        plain: list[Sequence] = []
        others: list[ScheduledChunk] = []
        for chunk in plan.chunks:
            seq = chunk.seq
            # Launched, and running still: it does not end with this token.
            if seq.state is _RUNNING and chunk.start >= seq.num_prefill_tokens and not chunk.dead:
                seq.num_pending_tokens -= 1
                plain.append(seq)
            else:
                others.append(chunk)
        self.plain = plain
        self._give(plain, 1, plan.num_rows)
        if not others:
            return Outcome([], [])
        got = _outputs(chunk.seq for chunk in others if chunk.seq.num_pending_tokens)
        rest = StepPlan(others, plan.num_rows, 0, 0, 0, None)
        return super().update_from_output(rest, got, now_s)

    def _give(self, sequences: Seq[Sequence], num_steps: int, num_rows: int) -> None:
        """The tokens of `num_steps` steps, each of `num_rows` rows."""
        tokens, num_row_steps = [TOKEN] * num_steps, num_steps * num_rows
        for seq in sequences:
            seq.output_token_ids += tokens
            seq.num_steps += num_steps
            seq.sum_batch_rows += num_row_steps
            if self._note_served is not None:
                self._note_served(seq, num_steps)
