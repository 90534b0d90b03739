"""The queue of sequences that have no slot yet, in the order in which they will get one.

Order is by priority with aging. At time `t` a group (the prompts of one request) has the rank
`priority + (t - arrival_s) / aging_s`; the highest rank is first, and among equals the earliest. All ranks
grow equally fast, so the order of two groups never changes, and the queue can sort by
`arrival_s - priority * aging_s` without a clock.

Hence the longest wait: with priorities 0 to 2, a group of priority `p` is overtaken only by groups that
arrive less than `(2 - p) * aging_s` after it, and no one overtakes a group that has waited `2 * aging_s`.
`aging_s == 0` ignores priorities. The one exception: a strategy that takes groups finishes a group it has
begun before any other.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence as Seq
from collections.abc import Set
from itertools import compress, takewhile

from adapters.base import Sequence


class WaitingQueue:
    def __init__(self, aging_s: float) -> None:
        self._aging_s = aging_s
        self._sequences: list[Sequence] = []
        self._sort_keys: list[float] = []
        self._begun_group_id: int | None = None

    def __len__(self) -> int:
        return len(self._sequences)

    @property
    def sequences(self) -> Seq[Sequence]:
        """The queue itself, head first; not to be changed."""
        return self._sequences

    def push(self, group: Seq[Sequence]) -> None:
        """Insert the sequences of one request, side by side, by their priority and arrival."""
        sort_key = group[0].arrival_s - group[0].priority * self._aging_s
        num_begun = sum(1 for _ in takewhile(self._has_begun, self._sequences))
        index = bisect_right(self._sort_keys, sort_key, lo=num_begun)  # behind its equals
        self._sequences[index:index] = group
        self._sort_keys[index:index] = [sort_key] * len(group)

    def pop(self, count: int, *, keep_group_first: bool) -> list[Sequence]:
        """Take `count` sequences from the head.

        With `keep_group_first` the rest of the last one's group stays at the head, whatever arrives, so that
        a group runs in consecutive slices.
        """
        taken = self._sequences[:count]
        del self._sequences[:count], self._sort_keys[:count]
        self._begun_group_id = taken[-1].group_id if taken and keep_group_first else None
        return taken

    def take(self, seq_ids: Set[int]) -> list[Sequence]:
        """Take out those of these ids that wait, in the order of the queue, in one pass over it.

        Clients leave by the hundred: one search a sequence would cost the square of the queue.
        """
        kept = [seq.seq_id not in seq_ids for seq in self._sequences]
        taken = [seq for seq, stays in zip(self._sequences, kept, strict=True) if not stays]
        if taken:
            self._sequences = list(compress(self._sequences, kept))
            self._sort_keys = list(compress(self._sort_keys, kept))
        return taken

    def _has_begun(self, seq: Sequence) -> bool:
        return seq.group_id == self._begun_group_id
