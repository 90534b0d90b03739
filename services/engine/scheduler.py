"""Decides who computes what in the next step, and books what came of it.

Sequences enter; a `StepPlan` leaves for the backend; the backend's outputs come back; what leaves then
is an `Outcome`: what to tell the clients and which cache space to free. It is pure: no clock (`now_s`
is given), no asyncio, no torch. *How many* join is the strategy's answer, *who* is the queue's.
KV is reserved on admission, so nobody is ever preempted.

A step is booked in one piece (`commit`) or in two: `advance` when it is launched, `settle` when its tokens
are there. In between the next step may be planned: whoever gets its last token by `max_tokens` has left
by then, whoever happens to end with an end-of-sequence token computes one row in vain.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from itertools import chain

from adapters.base import FinishReason, Sequence, SequenceState, StepOutput
from services.contract.timings import SequenceTimings
from services.engine.limits import SchedulerLimits
from services.engine.messages import SequenceUpdate
from services.engine.running_batch import RunningBatch
from services.engine.step_plan import StepPlan, lay_out
from services.engine.waiting_queue import WaitingQueue
from services.strategies.base import BatchingStrategy

__all__ = ["Outcome", "Scheduler", "SchedulerLimits", "StepPlan"]

_RUNNING, _ENDING, _FINISHED = SequenceState.RUNNING, SequenceState.ENDING, SequenceState.FINISHED


@dataclass(frozen=True, slots=True)
class Outcome:
    """What to publish, and the ids whose cache space the backend may free."""

    updates: list[SequenceUpdate]
    released_seq_ids: list[int]


class Scheduler:
    def __init__(
        self, strategy: BatchingStrategy, limits: SchedulerLimits, eos_token_ids: Iterable[int] = ()
    ) -> None:
        self.limits = limits
        self._strategy = strategy
        self._eos_token_ids = frozenset(eos_token_ids)
        self._waiting = WaitingQueue(limits.aging_s)
        self._batch = RunningBatch(limits, pads=strategy.keeps_finished_rows and limits.pad_finished)
        self._ending: dict[int, Sequence] = {}  # their last token is launched
        self._draining = False
        self._held_back: list[Sequence] = []  # slot and KV were free, but the strategy said no
        self._held_since_s = 0.0

    @property
    def num_running(self) -> int:
        """Sequences that are being answered; dead rows are not."""
        return self._batch.num_live + len(self._ending)

    @property
    def queue_depth(self) -> int:
        return len(self._waiting)

    @property
    def kv_used_tokens(self) -> int:
        """KV places reserved, those of dead rows included."""
        return self._batch.kv_used_tokens

    def prefilling_seq_ids(self) -> list[int]:
        """Of the running ones, those that have no token yet."""
        seq_ids = [
            seq.seq_id for seq in self._batch.sequences if seq.first_token_s is None and seq.state is _RUNNING
        ]
        return seq_ids + [seq.seq_id for seq in self._ending.values() if seq.first_token_s is None]

    @property
    def needs_tokens(self) -> bool:
        """Planning has to wait for the tokens of the launched step: penalties on the next one count them."""
        return any(
            seq.num_pending_tokens and seq.state is _RUNNING and seq.params.has_penalties
            for seq in self._batch.sequences
        )

    def add(self, sequences: Seq[Sequence]) -> None:
        """Queue the sequences of one request; they share their fate, their priority and their arrival.

        Raises:
            RequestTooLong: one of them, or a group that must run together, can never fit.
        """
        assert all(seq.prompt_token_ids for seq in sequences), "the API refuses empty prompts"
        self.limits.check(sequences, together=self._strategy.takes_groups)
        self._waiting.push(sequences)

    def drain(self) -> None:
        """Nobody else will come: the strategy may stop waiting for company."""
        self._draining = True

    def cancel(self, seq_ids: Iterable[int], now_s: float, reason: FinishReason = "abort") -> Outcome:
        """End these sequences, waiting or running; unknown and finished ids are ignored.

        In a padded batch the slot stays taken until the batch is done; the client hears at once.
        """
        self._charge_held_back(now_s)
        wanted = set(seq_ids)
        self._held_back = [seq for seq in self._held_back if seq.seq_id not in wanted]
        waiting = [seq for seq in self._waiting.sequences if seq.seq_id in wanted]
        for seq in waiting:
            self._waiting.remove(seq)
        running = [s for s in self._batch.sequences if s.seq_id in wanted and s.state is _RUNNING]
        ending = [seq for seq in self._ending.values() if seq.seq_id in wanted]
        updates = [self._end(seq, [], reason, now_s) for seq in chain(waiting, running, ending)]
        return Outcome(updates, self._batch.sweep())

    def plan(self, now_s: float) -> StepPlan:
        """Admit whom the strategy lets in, and lay out the next step."""
        self._charge_held_back(now_s)
        recheck_at_s = self._admit(now_s) if self._waiting else None
        return lay_out(self._batch.sequences, self._batch.num_dead, self.limits, recheck_at_s)

    def commit(self, plan: StepPlan, outputs: Iterable[StepOutput], now_s: float) -> Outcome:
        """Book a step that was not planned beyond; `now_s` is when its tokens were there."""
        for chunk in plan.chunks:
            if not chunk.dead:
                chunk.seq.num_computed_tokens = chunk.start + chunk.num_tokens
        return self.settle(plan, outputs, now_s)

    def advance(self, plan: StepPlan) -> list[int]:
        """Book that a step is launched and will give one token to each sequence that is due one.

        Returns the ids whose cache space is free for any later step: those that get their last token.
        """
        for chunk in plan.chunks:
            if chunk.dead:
                continue
            seq = chunk.seq
            if chunk.samples:
                seq.num_pending_tokens += 1
                if len(seq.output_token_ids) + seq.num_pending_tokens >= seq.params.max_tokens:
                    seq.state = _ENDING
                    self._ending[seq.seq_id] = seq
                    self._batch.num_dead += 1
            seq.num_computed_tokens = chunk.start + chunk.num_tokens
        return self._batch.sweep()

    def settle(self, plan: StepPlan, outputs: Iterable[StepOutput], now_s: float) -> Outcome:
        """Book what the oldest launched step gave; `plan` is that step `in_hindsight`."""
        tokens_of = {output.seq_id: output.token_ids for output in outputs}
        num_rows = plan.num_rows
        updates = []
        for chunk in plan.chunks:
            if chunk.dead:
                continue
            seq = chunk.seq
            seq.num_steps += 1
            seq.sum_batch_rows += num_rows
            token_ids = tokens_of.get(seq.seq_id)
            if token_ids:
                updates.append(self._append(seq, token_ids, now_s))
            elif chunk.start + chunk.num_tokens >= len(seq.prompt_token_ids) + len(seq.output_token_ids):
                updates.append(self._fail(seq, "the backend computed this sequence but gave no token", now_s))
        return Outcome(updates, self._batch.sweep())

    def abandon(self, plan: StepPlan, message: str, now_s: float) -> Outcome:
        """Book a step that the backend could not compute: all its rows end and leave, dead ones too.

        What a later step, launched by then, computes for them is in vain.
        """
        updates = [self._fail(chunk.seq, message, now_s) for chunk in plan.chunks if not chunk.dead]
        for chunk in plan.chunks:
            chunk.seq.num_computed_tokens = 0
        return Outcome(updates, self._batch.sweep())

    def _admit(self, now_s: float) -> float | None:
        """Ask the strategy, cut its answer at what fits, and note whom it held back."""
        waiting, running = self._waiting.sequences, self._batch.sequences
        admission = self._strategy.admit(waiting, running, now_s=now_s, draining=self._draining)
        num_fitting = _num_in_company(waiting[: self._batch.num_fitting(waiting)], running)
        count = min(max(admission.count, 0), len(waiting))
        if count > num_fitting:
            waits_until_all_fit = self._strategy.takes_groups and running
            count = 0 if waits_until_all_fit else num_fitting
        if count:
            joining = self._waiting.pop(count, keep_group_first=self._strategy.takes_groups)
            self._batch.join(joining, now_s)
        self._held_back = list(waiting[: num_fitting - count])
        return admission.recheck_at_s

    def _append(self, seq: Sequence, token_ids: list[int], now_s: float) -> SequenceUpdate:
        """Give `seq` its new tokens up to the one that ends it; an end-of-sequence token counts as output."""
        if seq.first_token_s is None:
            seq.first_token_s = now_s
        if seq.num_pending_tokens:
            seq.num_pending_tokens -= 1
        output, max_tokens = seq.output_token_ids, seq.params.max_tokens
        stops_at = () if seq.params.ignore_eos else self._eos_token_ids
        seq.num_computed_tokens -= 1  # the last new token is not in the cache yet
        for num_new, token_id in enumerate(token_ids, start=1):
            output.append(token_id)
            seq.num_computed_tokens += 1
            if token_id in stops_at or len(output) >= max_tokens:
                reason: FinishReason = "stop" if token_id in stops_at else "length"
                return self._end(seq, token_ids[:num_new], reason, now_s)
        return SequenceUpdate(seq.seq_id, token_ids)

    def _fail(self, seq: Sequence, message: str, now_s: float) -> SequenceUpdate:
        seq.num_computed_tokens = 0
        return self._end(seq, [], "error", now_s, message)

    def _end(
        self,
        seq: Sequence,
        token_ids: list[int],
        reason: FinishReason,
        now_s: float,
        error: str | None = None,
    ) -> SequenceUpdate:
        """End `seq`, wherever it is: in the queue, in the batch or with its last token launched."""
        if seq.state is _RUNNING:
            self._batch.num_dead += 1
        elif seq.state is _ENDING:
            del self._ending[seq.seq_id]
        return _finish(seq, token_ids, reason, now_s, error)

    def _charge_held_back(self, now_s: float) -> None:
        for seq in self._held_back:
            seq.batch_wait_s += now_s - self._held_since_s
        self._held_since_s = now_s


def _num_in_company(fitting: Seq[Sequence], running: Seq[Sequence]) -> int:
    """How many of these may join as far as company goes: who wants to be alone waits for an empty batch."""
    if not fitting or any(seq.alone for seq in running):
        return 0
    if fitting[0].alone:
        return 0 if running else 1
    return next((place for place, seq in enumerate(fitting) if seq.alone), len(fitting))


def _finish(
    seq: Sequence, token_ids: list[int], reason: FinishReason, now_s: float, error: str | None = None
) -> SequenceUpdate:
    """End `seq` and split its time since arrival into four parts."""
    seq.state = _FINISHED
    seq.num_pending_tokens = 0
    seq.finish_reason = reason
    seq.finished_s = now_s
    admitted_s = now_s if seq.admitted_s is None else seq.admitted_s
    first_token_s = now_s if seq.first_token_s is None else seq.first_token_s
    timings = SequenceTimings(
        queue_s=max(0.0, admitted_s - seq.arrival_s - seq.batch_wait_s),
        batch_wait_s=seq.batch_wait_s,
        prefill_s=first_token_s - admitted_s,
        decode_s=now_s - first_token_s,
        num_steps=seq.num_steps,
        mean_batch_size=seq.sum_batch_rows / seq.num_steps if seq.num_steps else 0.0,
        first_token_s=seq.first_token_s,
    )
    return SequenceUpdate(seq.seq_id, token_ids, reason, timings, error)
