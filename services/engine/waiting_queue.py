"""The queue of sequences that have no slot yet, in the order in which they will get one.

Groups of sequences enter (the prompts of one request); sequences leave from the head. Order is by
priority with aging. It reads no clock and knows nothing of slots, KV or strategies.

At time `t` a group's rank is `priority + (t - arrival_s) / aging_s`, the highest first and first come
first served among equals. All ranks grow equally fast, so the order of two groups never changes, and
`arrival_s - priority * aging_s` sorts the same way without a clock. Hence the longest wait: with
priorities 0 to 2, a group of priority `p` is overtaken only by groups that arrive less than
`(2 - p) * aging_s` after it, and nobody overtakes one that has waited `2 * aging_s`. `aging_s == 0`
ignores priorities. The one exception: a strategy that takes groups finishes a group it has begun.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence as Seq
from itertools import takewhile

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
        """Put the sequences of one request, side by side, where their priority and arrival belong."""
        sort_key = group[0].arrival_s - group[0].priority * self._aging_s
        num_begun = sum(1 for _ in takewhile(self._has_begun, self._sequences))
        place = bisect_right(self._sort_keys, sort_key, lo=num_begun)
        self._sequences[place:place] = group
        self._sort_keys[place:place] = [sort_key] * len(group)

    def pop(self, count: int, *, keep_group_first: bool) -> list[Sequence]:
        """Take `count` sequences from the head.

        With `keep_group_first` the rest of the last one's group stays at the head, whoever comes,
        so that a group runs in consecutive slices.
        """
        taken = self._sequences[:count]
        del self._sequences[:count], self._sort_keys[:count]
        self._begun_group_id = taken[-1].group_id if taken and keep_group_first else None
        return taken

    def remove(self, seq: Sequence) -> None:
        place = self._sequences.index(seq)
        del self._sequences[place], self._sort_keys[place]

    def _has_begun(self, seq: Sequence) -> bool:
        return seq.group_id == self._begun_group_id
