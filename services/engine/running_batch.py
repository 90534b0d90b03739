"""The sequences that have a slot, and the account of slots and KV.

A sequence joins when it is admitted and leaves when its cache space may be freed. In a padded batch a
finished sequence stays as a dead row until the last one is done. A sequence whose last token is launched
counts as finished here: its slot is free for the next step.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

from adapters.base import Sequence, SequenceState
from services.engine.limits import SchedulerLimits


class RunningBatch:
    """`pads`: finished rows stay. KV is reserved for a sequence's prompt and everything it may produce."""

    def __init__(self, limits: SchedulerLimits, *, pads: bool) -> None:
        self._max_batch = limits.max_batch
        self._kv_capacity_tokens = limits.kv_capacity_tokens
        self._pads = pads
        self.sequences: list[Sequence] = []  # in order of admission, dead rows among them
        self.num_dead = 0  # whoever ends a sequence of this batch counts it here, then calls `sweep`
        self.kv_used_tokens = 0

    @property
    def num_live(self) -> int:
        return len(self.sequences) - self.num_dead

    @property
    def has_free_slot(self) -> bool:
        return len(self.sequences) < self._max_batch

    def num_fitting(self, waiting: Seq[Sequence], *, without_dead: bool = False) -> int:
        """How many sequences from the head of the queue would find a slot and KV now.

        `without_dead` counts what dead rows keep as free.
        """
        free_kv_tokens = self._kv_capacity_tokens - self.kv_used_tokens
        num_slots = self._max_batch - len(self.sequences)
        if without_dead:
            dead = [seq for seq in self.sequences if seq.state is not SequenceState.RUNNING]
            free_kv_tokens += sum(seq.max_total_tokens for seq in dead)
            num_slots += len(dead)
        count = 0
        for seq in waiting[:num_slots]:
            free_kv_tokens -= seq.max_total_tokens
            if free_kv_tokens < 0:
                break  # a shorter one behind it does not slip past, or the head might never fit
            count += 1
        return count

    def join(self, joining: Seq[Sequence], now_s: float) -> None:
        for seq in joining:
            seq.state = SequenceState.RUNNING
            seq.admitted_s = now_s
            self.kv_used_tokens += seq.max_total_tokens
        self.sequences += joining

    def sweep(self) -> list[int]:
        """Let finished sequences go; returns their ids, whose cache space is free.

        A finished sequence goes at once or, in a padded batch, with the last one. One with nothing in the
        cache goes at once from a padded batch too: it was cancelled before its first chunk or lost its cache
        in a failed step, and so has no last position to compute. So does an exclusive one: it was no row of
        the batch.
        """
        if not self.num_dead:
            return []
        is_done = not self._pads or not self.num_live
        staying: list[Sequence] = []
        leaving: list[Sequence] = []
        for seq in self.sequences:
            has_no_row = seq.exclusive or not seq.num_computed_tokens
            goes = seq.state is not SequenceState.RUNNING and (is_done or has_no_row)
            (leaving if goes else staying).append(seq)
        self.sequences = staying
        self.num_dead -= len(leaving)
        self.kv_used_tokens -= sum(seq.max_total_tokens for seq in leaving)
        return [seq.seq_id for seq in leaving]
