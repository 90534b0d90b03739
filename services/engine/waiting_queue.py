"""The queue of sequences that have no slot yet, in the order in which they will get one.

The order is a policy (`services.orders`); the groups, the prompts of one request, stay side by side under
each of them. Two exceptions from it: sequences that were preempted stand at the head, and a strategy that
takes groups finishes a group it has begun before any other.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence as Seq
from collections.abc import Set
from itertools import chain, compress, islice, takewhile

from adapters.base import Sequence
from services.orders.base import ChangingOrder, Group, QueueOrder


class WaitingQueue:
    def __init__(self, order: QueueOrder) -> None:
        # A fixed order sorts a group in when it comes, a changing one all of them when some may join.
        self._sort_key = None if isinstance(order, ChangingOrder) else order.sort_key
        self._arrange = order.arrange if isinstance(order, ChangingOrder) else None
        self._sequences: list[Sequence] = []
        self._sort_keys: list[float] = []
        self._begun_group_id: int | None = None
        self._num_preempted = 0  # they stand at the head

    def __len__(self) -> int:
        return len(self._sequences)

    @property
    def sequences(self) -> Seq[Sequence]:
        """The queue itself, head first; not to be changed."""
        return self._sequences

    def push(self, group: Seq[Sequence]) -> None:
        """Insert the sequences of one request, side by side."""
        sort_key = self._sort_key(group) if self._sort_key else 0.0
        index = bisect_right(self._sort_keys, sort_key, lo=self._num_begun())  # behind its equals
        self._sequences[index:index] = group
        self._sort_keys[index:index] = [sort_key] * len(group)

    def push_back(self, seq: Sequence) -> None:
        """Insert a preempted sequence at the head: all that were preempted before it stand behind it."""
        self._sequences.insert(0, seq)
        self._sort_keys.insert(0, -math.inf)
        self._num_preempted += 1

    def arrange(self, now_s: float) -> None:
        """Bring the queue into the order of this moment, where the order is one that changes."""
        if self._arrange is None or not self._sequences:
            return
        num_begun = self._num_begun()
        # Without `groupby`, which takes three times as long: this is done at each step with a free slot.
        groups: list[Group] = []
        last: list[Sequence] = []
        for seq in islice(self._sequences, num_begun, None):
            if last and seq.group_id == last[0].group_id:
                last.append(seq)
            else:
                last = [seq]
                groups.append(last)
        if groups:
            self._sequences[num_begun:] = chain.from_iterable(self._arrange(groups, now_s))

    def pop(self, count: int, *, keep_group_first: bool) -> list[Sequence]:
        """Take `count` sequences from the head.

        With `keep_group_first` the rest of the last one's group stays at the head, whatever arrives, so that
        a group runs in consecutive slices.
        """
        taken = self._sequences[:count]
        del self._sequences[:count], self._sort_keys[:count]
        self._num_preempted = max(0, self._num_preempted - count)
        self._begun_group_id = taken[-1].group_id if taken and keep_group_first else None
        return taken

    def take(self, seq_ids: Set[int]) -> list[Sequence]:
        """Take out those of these ids that wait, in the order of the queue, in one pass over it.

        Clients leave by the hundred: one search a sequence would cost the square of the queue.
        """
        kept = [seq.seq_id not in seq_ids for seq in self._sequences]
        taken = [seq for seq, stays in zip(self._sequences, kept, strict=True) if not stays]
        if taken:
            self._num_preempted = sum(kept[: self._num_preempted])
            self._sequences = list(compress(self._sequences, kept))
            self._sort_keys = list(compress(self._sort_keys, kept))
        return taken

    def _num_begun(self) -> int:
        """Sequences at the head that no order moves: preempted ones, then those of a group that has begun."""
        begun_id, num_preempted = self._begun_group_id, self._num_preempted
        if begun_id is None:
            return num_preempted
        rest = islice(self._sequences, num_preempted, None)
        return num_preempted + sum(1 for _ in takewhile(lambda seq: seq.group_id == begun_id, rest))
