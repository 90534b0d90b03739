"""The sequences that have a slot, and who must go where memory runs out.

A sequence joins when it is admitted and leaves when its cache space may be freed. In a padded batch a
finished sequence stays as a dead row until the last one is done. A sequence whose last token is launched
counts as finished here: its slot is free for the next step.

Preemption takes dead rows first, then the sequence that stands last by priority and arrival, with aging as in
the order `fcfs`. The one that stands first is never preempted, and it always fits, so all end some day: at
most those with a higher priority that came less than `2 * aging_s` after a sequence can preempt it. With
PRIORITY_PREEMPTION=1 a waiting sequence may so take the place of running ones that stand behind it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as Seq

from adapters.base import KV_BLOCK, ScheduledChunk, Sequence, SequenceState
from services.engine.kv_memory import KvMemory
from services.engine.limits import SchedulerLimits
from services.kv_policies.base import KvPolicy

_RUNNING = SequenceState.RUNNING


class RunningBatch:
    """`pads`: finished rows stay."""

    def __init__(self, limits: SchedulerLimits, kv: KvPolicy, *, pads: bool) -> None:
        self._limits = limits
        self.grows = kv.grows
        self.memory = KvMemory(kv, limits)
        self._pads = pads
        self.sequences: list[Sequence] = []  # in order of admission, dead rows among them
        self.num_dead = 0  # whoever ends a sequence of this batch counts it here, then calls `sweep`
        self._padding: deque[tuple[Sequence, int]] = deque()  # positions up to the longest prompt

    @property
    def num_live(self) -> int:
        return len(self.sequences) - self.num_dead

    @property
    def has_free_slot(self) -> bool:
        return len(self.sequences) < self._limits.max_batch

    def num_fitting(self, waiting: Seq[Sequence], *, without_dead: bool = False) -> int:
        """How many sequences from the head of the queue would find a slot and KV now.

        `without_dead` counts what dead rows keep as free.
        """
        memory = self.memory
        free_kv_tokens = memory.free_tokens
        num_others = len(self.sequences)
        if without_dead and self.num_dead:
            dead = [seq for seq in self.sequences if seq.state is not _RUNNING]
            free_kv_tokens += sum(memory.held_tokens[seq.seq_id] for seq in dead)
            num_others = self.num_live
        count = 0
        for seq in waiting[: self._limits.max_batch - num_others]:
            free_kv_tokens -= memory.num_to_join(seq)
            # One alone needs nothing to spare, or a long one might never join.
            if free_kv_tokens < memory.num_spare_tokens(is_alone=not (num_others or count)):
                break  # a shorter one behind it does not slip past, or the head might never fit
            count += 1
        return count

    def num_steps_within(self, seq: Sequence) -> int:
        """How many more steps a decoding sequence can take in the KV that it holds."""
        return self.memory.held_tokens[seq.seq_id] - seq.num_computed_tokens

    def join(self, joining: Seq[Sequence], now_s: float) -> None:
        for seq in joining:
            assert not seq.num_pending_tokens, "a preempted sequence got its launched token before this step"
            seq.state = _RUNNING
            seq.num_prefill_tokens = seq.num_tokens
            self.memory.join(seq)
            if seq.admitted_s is None:
                seq.admitted_s = now_s
        self.sequences += joining
        if self._pads and self._limits.pads_like_generate:
            shared = [seq for seq in joining if not seq.exclusive]
            width = max((seq.num_prompt_tokens for seq in shared), default=0)
            self._padding.extend((seq, at) for seq in shared for at in range(seq.num_prompt_tokens, width))

    def take_padding(self) -> list[ScheduledChunk]:
        """The next step of rows that pad prompts up to the longest of their batch, once these are computed.

        Later rows of the sequence overwrite what they leave in its cache.
        """
        chunks: list[ScheduledChunk] = []
        while self._padding and len(chunks) < self._limits.max_step_tokens:
            seq, at = self._padding.popleft()
            # One cancelled before its first chunk has no slot; a position with a token stays as it is.
            if 0 < seq.num_computed_tokens <= at:
                chunks.append(ScheduledChunk(seq, at, 1, dead=True))
        return chunks

    def make_room(self) -> tuple[list[int], list[Sequence]]:
        """Give each running sequence the KV of its next step, at the cost of others where none is free.

        Returns the ids whose cache space is to be freed, and which of these sequences were preempted, the one
        that stands last by priority and arrival first.
        """
        released: list[int] = []
        preempted: list[Sequence] = []
        if not self.grows:
            return released, preempted
        memory, held_tokens = self.memory, self.memory.held_tokens
        outgrown = [s for s in self.sequences if s.num_computed_tokens >= held_tokens[s.seq_id]]
        for seq in outgrown:
            if seq.state is not _RUNNING:
                continue  # a dead row, or preempted for one before it
            more = memory.num_to_grow(seq)
            while seq.state is _RUNNING and memory.free_tokens < more:
                victim = self._choose_victim()
                released.append(victim.seq_id)
                if victim.state is _RUNNING:
                    preempted.append(self._preempt(victim))
                else:
                    self.sequences.remove(victim)
                    memory.leave(victim)
                    self.num_dead -= 1
            if seq.state is _RUNNING:
                memory.grow(seq, more)
        return released, preempted

    def make_way(self, seq: Sequence) -> list[Sequence]:
        """Preempt those that stand behind `seq` by priority and arrival, the last one first, until it fits.

        Nobody, where it fits already or the place of all of them would not do. Dead rows keep theirs.
        """
        memory = self.memory
        behind = [other for other in self.sequences if self._rank(other) > self._rank(seq)]
        num_others = len(self.sequences) - len(behind)
        free_tokens = memory.free_tokens + sum(map(memory.num_held_alone, behind))
        # What it shares with others may go with them.
        free_tokens -= memory.num_to_join(seq, shared=False)
        if num_others >= self._limits.max_batch or free_tokens < memory.num_spare_tokens(
            is_alone=not num_others
        ):
            return []
        behind.sort(key=lambda other: (self._rank(other), other.seq_id))
        preempted: list[Sequence] = []
        while not self.num_fitting([seq]):
            preempted.append(self._preempt(behind.pop()))
        return preempted

    def sweep(self) -> list[int]:
        """Let finished sequences go; returns their ids, whose cache space is free.

        A finished sequence goes at once or, in a padded batch, with the last one. One with nothing in the
        cache goes at once from a padded batch too: it was cancelled before its first chunk or lost its cache
        in a failed step, and so has no last position to compute. So does an exclusive one: it was no row of
        the batch.
        """
        if not self.num_dead:
            return []
        leaving = [seq for seq in self.sequences if seq.state is not _RUNNING]
        if self._pads and self.num_live:
            # A row would compute its last position: not in a block that others may share.
            leaving = [
                seq for seq in leaving
                if seq.exclusive or seq.num_computed_tokens <= KV_BLOCK * len(seq.prefix_keys)
            ]  # fmt: skip
        self.num_dead -= len(leaving)
        for seq in leaving:
            self.sequences.remove(seq)
            self.memory.leave(seq)
        if not self.sequences:
            self._padding.clear()  # all ended with their first token
        return [seq.seq_id for seq in leaving]

    def _preempt(self, seq: Sequence) -> Sequence:
        self.sequences.remove(seq)
        self.memory.leave(seq)
        seq.state = SequenceState.WAITING
        seq.num_computed_tokens = 0
        return seq

    def _rank(self, seq: Sequence) -> float:
        """As in the order `fcfs`: the lowest stands first."""
        return seq.arrival_s - seq.priority * self._limits.aging_s

    def _choose_victim(self) -> Sequence:
        """A dead row, whose work is for nobody; else the lowest priority and latest arrival, with aging."""
        if self.num_dead:
            return next(seq for seq in self.sequences if seq.state is not _RUNNING)
        return max(self.sequences, key=lambda seq: (self._rank(seq), seq.seq_id))
