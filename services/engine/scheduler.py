"""Chooses the rows of the next step, and updates the sequences from what the backend returns.

The calls of a step's life are named as in vLLM. `schedule` admits sequences and lays out the step,
`mark_launched` notes that the backend has started it, `update_from_output` takes its tokens; `mark_failed`
replaces the last one, or both, where the backend could not compute it.

The next step may be scheduled between `mark_launched` and `update_from_output`. A sequence that reaches
`max_tokens` with the launched step is known to end, and has left the batch by then. A sequence that ends with
an end-of-sequence token is not, and computes one row in vain.

An exclusive sequence shares no step. It joins as others do, and while one runs every second step is for one
of them alone, in turn: were the batch to empty for it first, all would wait for the longest running answer.

The scheduler is pure: no clock (`now_s` is given), no asyncio, no torch. *How many* sequences join is the
strategy's answer, *which* is the order's, what a step carries the layout's, how much KV a sequence must hold
the KV policy's. A sequence that is preempted, as no KV is left, goes back to the head of the queue; with
PRIORITY_PREEMPTION=1 to its place by priority and arrival. The token that a launched step still gives it
counts.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain

from adapters.base import FinishReason, Sequence, SequenceState, StepOutput
from services.engine.block_pool import prefix_keys
from services.engine.finish import append_tokens, finish
from services.engine.limits import SchedulerLimits
from services.engine.messages import SequenceUpdate
from services.engine.policies import Policies
from services.engine.running_batch import RunningBatch
from services.engine.step_plan import StepPlan, lay_out
from services.engine.waiting_queue import WaitingQueue
from services.orders.base import ChangingOrder
from services.strategies.base import BatchingStrategy

__all__ = ["Outcome", "Scheduler", "SchedulerLimits", "StepPlan"]

_WAITING, _RUNNING, _ENDING = SequenceState.WAITING, SequenceState.RUNNING, SequenceState.ENDING


@dataclass(slots=True)  # not frozen, which takes three times as long: each step makes one
class Outcome:
    """What to publish, and the ids whose cache space the backend may free."""

    updates: list[SequenceUpdate]
    released_seq_ids: list[int]


class Scheduler:
    def __init__(
        self,
        strategy: BatchingStrategy,
        limits: SchedulerLimits,
        eos_token_ids: Iterable[int] = (),
        policies: Policies = Policies(),  # noqa: B008 frozen
    ) -> None:
        self.limits = limits = policies.within(limits)
        self._strategy = strategy
        self._eos_token_ids = frozenset(eos_token_ids)
        self._layout, self._oracle = policies.make_layout(), policies.make_oracle()
        self._admission = policies.make_admission()
        order = policies.make_order(limits.aging_s)
        self._waiting = WaitingQueue(order)
        self._note_served = order.served if isinstance(order, ChangingOrder) else None
        pads = strategy.keeps_finished_rows and limits.pad_finished
        self._batch = RunningBatch(limits, policies.make_kv_policy(), pads=pads)
        self._caches_prefixes = policies.prefix_cache
        # Others fill their batch when nothing runs, and preempt nobody for one more.
        self._preempts_by_priority = policies.priority_preemption and strategy.admits_while_running
        self._joined: list[Sequence] = []  # for the first time, with the step that is being scheduled
        self._ending: dict[int, Sequence] = {}  # their last token is launched and not known yet
        self._alone: deque[Sequence] = deque()  # the exclusive ones of the batch, whose turn is next first
        self._was_alone = False  # whether the last step was for one of them
        self._draining = False
        self._held_back: list[Sequence] = []  # the strategy said no, although dead rows alone were in the way
        self._held_since_s = 0.0

    @property
    def num_running(self) -> int:
        """Sequences that are being answered; dead rows are not."""
        return self._batch.num_live + len(self._ending)

    @property
    def _running(self) -> Seq[Sequence]:
        """What a strategy sees of the batch."""
        return self._batch.sequences

    @property
    def queue_depth(self) -> int:
        return len(self._waiting)

    @property
    def kv_used_tokens(self) -> int:
        """KV positions that sequences hold, dead rows included."""
        return self._batch.memory.used_tokens

    def prefilling_seq_ids(self) -> list[int]:
        """The running sequences that have no token yet."""
        seq_ids = [
            seq.seq_id for seq in self._batch.sequences if seq.first_token_s is None and seq.state is _RUNNING
        ]
        return seq_ids + [seq.seq_id for seq in self._ending.values() if seq.first_token_s is None]

    @property
    def needs_tokens(self) -> bool:
        """The next step cannot be scheduled before the tokens of the launched one are known.

        Penalties on a sequence's next token count the tokens before it.
        """
        return any(
            seq.num_pending_tokens and seq.state is _RUNNING and seq.params.has_penalties
            for seq in self._batch.sequences
        )

    def add(self, sequences: Seq[Sequence]) -> None:
        """Queue the sequences of one request; they share priority and arrival, and are refused together.

        Raises:
            RequestTooLong: one of them, or a group that must run together, can never fit.
        """
        self.limits.check(sequences, together=self._strategy.takes_groups)
        for seq in sequences:
            assert seq.prompt_token_ids, "the API refuses empty prompts"
            seq.predicted_tokens = self._oracle.predict(seq)
            if self._caches_prefixes:
                seq.prefix_keys = prefix_keys(seq.prompt_token_ids)
        self._waiting.push(sequences)

    def drain(self) -> None:
        """No further request comes: the strategy may stop waiting for a fuller batch."""
        self._draining = True

    def cancel(self, seq_ids: Iterable[int], now_s: float, reason: FinishReason = "abort") -> Outcome:
        """End these sequences, waiting or running; unknown and finished ids are ignored.

        The client hears of it at once. In a padded batch the slot stays taken until the batch is done.
        """
        self._charge_held_back(now_s)
        wanted = set(seq_ids)
        self._held_back = [seq for seq in self._held_back if seq.seq_id not in wanted]
        waiting = self._waiting.take(wanted)
        running = [s for s in self._batch.sequences if s.seq_id in wanted and s.state is _RUNNING]
        ending = [seq for seq in self._ending.values() if seq.seq_id in wanted]
        updates = [self._end(seq, [], reason, now_s) for seq in chain(waiting, running, ending)]
        return Outcome(updates, self._batch.sweep())

    def schedule(self, now_s: float) -> StepPlan:
        """Make room for those that run, admit those that the strategy lets in, and lay out the next step."""
        self._charge_held_back(now_s)
        released_seq_ids, preempted = self._batch.make_room()
        self._joined = []
        if self._preempts_by_priority and self._waiting and not preempted:
            preempted = self._make_way(now_s)
            released_seq_ids += [seq.seq_id for seq in preempted]
        for seq in preempted:
            self._put_back(seq)
        recheck_at_s = None
        if preempted:
            self._held_back = []  # where those that run find no room, nobody joins them
        elif self._waiting:
            recheck_at_s = self._admit(now_s)
        plan = self._lay_out(recheck_at_s)
        if released_seq_ids:
            plan = replace(plan, released_seq_ids=released_seq_ids, num_preempted=len(preempted))
        return plan.with_looked_up(self._joined) if self._caches_prefixes and self._joined else plan

    def _lay_out(self, recheck_at_s: float | None) -> StepPlan:
        while self._alone and self._alone[0].state is not _RUNNING:
            self._alone.popleft()
        lay_out_step = partial(lay_out, self._layout, self.limits, recheck_at_s)
        if not self._alone:
            plan = lay_out_step(self._batch.sequences, self._batch.num_dead)
            # As in generate(), nothing decodes before all prompts of the batch are computed and padded.
            if not plan.num_prompt_tokens and (padding := self._batch.take_padding()):
                return StepPlan(padding, 0, len(padding), 0, 0, recheck_at_s)
            return plan
        shared = [seq for seq in self._batch.sequences if not seq.exclusive]
        has_shared = len(shared) > self._batch.num_dead
        self._was_alone = not (self._was_alone and has_shared)
        if not self._was_alone:
            return lay_out_step(shared, self._batch.num_dead, others_wait=True)
        alone = self._alone[0]
        self._alone.rotate(-1)
        return lay_out_step([alone], 0, others_wait=has_shared)

    def mark_launched(self, plan: StepPlan) -> list[int]:
        """Note that the backend has started a step, which gives one token to each row that `samples`.

        Returns the ids whose cache space is free for the steps after this one.
        """
        has_ending = False
        for chunk in plan.chunks:
            seq = chunk.seq
            if chunk.dead:
                if seq.state is not _RUNNING:
                    seq.num_computed_tokens = chunk.start + 1
                continue
            seq.num_computed_tokens = end = chunk.start + chunk.num_tokens
            if seq.prefix_keys and not chunk.is_decode:
                self._batch.memory.note_computed(seq, chunk.start)
            num_outputs = len(seq.output_token_ids) + seq.num_pending_tokens
            if end < len(seq.prompt_token_ids) + num_outputs:
                continue  # the chunk ends inside the prompt
            seq.num_pending_tokens += 1
            if num_outputs + 1 >= seq.params.max_tokens:
                # Its slot goes to the next sequence now, one step before its last token is known.
                seq.state = _ENDING
                self._ending[seq.seq_id] = seq
                self._batch.num_dead += 1
                has_ending = True
        return self._batch.sweep() if has_ending else []

    def update_from_output(self, plan: StepPlan, outputs: Iterable[StepOutput], now_s: float) -> Outcome:
        """Take the tokens of the oldest launched step; `now_s` is when they were there.

        `plan` is that step `with_ended_rows_dead`.
        """
        output_of = {output.seq_id: output for output in outputs}
        num_rows = plan.num_rows
        updates = []
        for chunk in plan.chunks:
            if chunk.dead:
                continue
            seq = chunk.seq
            seq.num_steps += 1
            seq.sum_batch_rows += num_rows
            output = output_of.get(seq.seq_id)
            if output is not None and output.token_ids:
                update = self._append(seq, output.token_ids, now_s)
                if output.logprobs is not None:
                    update.logprobs = output.logprobs[: len(update.token_ids)]
                updates.append(update)
            elif chunk.start + chunk.num_tokens >= len(seq.prompt_token_ids) + len(seq.output_token_ids):
                updates.append(self._fail(seq, "the backend computed this sequence but gave no token", now_s))
        return Outcome(updates, self._batch.sweep())

    def mark_failed(self, plan: StepPlan, message: str, now_s: float) -> Outcome:
        """End all sequences of a step that the backend could not compute. Its dead rows leave too.

        A later step that is launched already computes their rows in vain.
        """
        updates = [self._fail(chunk.seq, message, now_s) for chunk in plan.chunks if not chunk.dead]
        for chunk in plan.chunks:
            if chunk.seq.state is not _RUNNING:  # one that runs had padding in this step, which is for nobody
                chunk.seq.num_computed_tokens = 0  # nothing in the cache can be trusted: `sweep` lets it go
        return Outcome(updates, self._batch.sweep())

    def _make_way(self, now_s: float) -> list[Sequence]:
        """Let the head of the queue take the place of those that stand behind it; returns these."""
        preempted = self._batch.make_way(self._waiting.sequences[0])
        if preempted:
            self._join(1, now_s)
        return preempted

    def _put_back(self, seq: Sequence) -> None:
        """Queue a preempted sequence: at the head, or where its priority has it if that may preempt."""
        if self._preempts_by_priority:
            self._waiting.push([seq])
        else:
            self._waiting.push_back(seq)
        if seq.exclusive:
            self._alone.remove(seq)

    def _admit(self, now_s: float) -> float | None:
        """Ask the strategy, cut its answer at what fits, and note which sequences it held back."""
        if self._batch.has_free_slot:
            self._waiting.arrange(now_s)
        waiting, running = self._waiting.sequences, self._running
        admission = self._strategy.admit(waiting, running, now_s=now_s, draining=self._draining)
        count = min(max(admission.count, 0), len(waiting))
        if count and not self._strategy.takes_groups:
            count = min(count, self._admission.most(waiting, len(running), self.limits.max_batch))
        if count and count > (num_fitting := self._batch.num_fitting(waiting)):
            # A group joins whole. When nothing runs it joins in part instead: waiting would free no KV.
            waits_until_all_fit = self._strategy.takes_groups and running
            count = 0 if waits_until_all_fit else num_fitting
        if count:
            self._join(count, now_s)
        self._held_back = self._find_held_back()
        return admission.recheck_at_s

    def _join(self, count: int, now_s: float) -> None:
        """Let so many from the head of the queue join the batch."""
        joining = self._waiting.pop(count, keep_group_first=self._strategy.takes_groups)
        self._joined = [seq for seq in joining if seq.admitted_s is None]
        if self._note_served:
            for seq in self._joined:  # what others compute again is not their clients' doing
                self._note_served(seq, 0)
        self._batch.join(joining, now_s)
        self._alone += [seq for seq in joining if seq.exclusive]

    def _find_held_back(self) -> list[Sequence]:
        """Those that could have joined, so that their wait is the strategy's.

        That finished rows keep their slots is its choice as well.
        """
        waiting = self._waiting.sequences
        if not waiting:
            return []
        num_fitting = self._batch.num_fitting(waiting, without_dead=True)
        return [seq for seq in waiting[:num_fitting] if seq.admitted_s is None]

    def _append(self, seq: Sequence, token_ids: list[int], now_s: float) -> SequenceUpdate:
        """Give `seq` its new tokens up to the one that ends it."""
        if seq.first_token_s is None:
            seq.first_token_s = now_s
        output = seq.output_token_ids
        num_before = len(output)
        reason = append_tokens(seq, token_ids, self._eos_token_ids)
        if self._note_served:
            self._note_served(seq, len(output) - num_before)
        seq.num_pending_tokens -= 1
        # A step that gives several tokens has cached the keys and values of all but the last.
        seq.num_computed_tokens += len(output) - num_before - 1
        if reason is None:
            return SequenceUpdate(seq.seq_id, token_ids)
        return self._end(seq, output[num_before:], reason, now_s)

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
            self._batch.num_dead += 1  # it keeps its slot until `sweep` lets it go
        elif seq.state is _ENDING:
            del self._ending[seq.seq_id]
        elif seq.state is _WAITING and seq.admitted_s is not None:
            self._waiting.take({seq.seq_id})  # preempted, and this is what a launched step gave it
        return finish(seq, token_ids, reason, now_s, error)

    def _charge_held_back(self, now_s: float) -> None:
        for seq in self._held_back:
            seq.batch_wait_s += now_s - self._held_since_s
        self._held_since_s = now_s
