"""Virtual token counter: the client that was served least is next, and its own requests stand as they came.

A client's counter grows by 1 for each prompt token that joins and by 2 for each output token. A client that
was away starts at the least counter of those that wait: nobody saves up service. Two clients that always
have requests waiting are so never further apart than twice the tokens of a full batch. A request's `user`
names its client.

Source: Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024, arXiv 2401.00588).
"""

from __future__ import annotations

import heapq
from collections import defaultdict, deque
from typing import ClassVar

from adapters.base import Sequence
from services.orders.base import Group, OrderConfig

_PROMPT_WEIGHT, _OUTPUT_WEIGHT = 1, 2
_MAX_CLIENTS_AWAY = 1024


class Vtc:
    name: ClassVar[str] = "vtc"

    def __init__(self, config: OrderConfig) -> None:
        self._counters: dict[str, int] = {}
        self._waited: set[str] = set()  # the clients that were there when the queue was arranged last
        self._floor = 0  # where a client starts if nobody else waits

    def arrange(self, groups: list[Group], now_s: float) -> list[Group]:
        queues: defaultdict[str, deque[Group]] = defaultdict(deque)
        for group in sorted(groups, key=lambda group: group[0].arrival_s):
            queues[group[0].client].append(group)
        self._floor = min((self._counters[c] for c in queues.keys() & self._waited), default=self._floor)
        for client in queues.keys() - self._waited:
            self._counters[client] = max(self._counters.get(client, 0), self._floor)
        self._waited = set(queues)
        heap = [(self._counters[client], queue[0][0].arrival_s, client) for client, queue in queues.items()]
        heapq.heapify(heap)
        if len(self._counters) > len(queues) + _MAX_CLIENTS_AWAY:  # who is at the floor needs no entry
            self._counters = {c: n for c, n in self._counters.items() if c in queues or n > self._floor}
        arranged = []
        while heap:
            counter, _, client = heapq.heappop(heap)
            group = queues[client].popleft()
            arranged.append(group)
            if queues[client]:
                counter += _PROMPT_WEIGHT * sum(seq.num_prompt_tokens for seq in group)
                heapq.heappush(heap, (counter, queues[client][0][0].arrival_s, client))
        return arranged

    def served(self, seq: Sequence, num_tokens: int) -> None:
        cost = _OUTPUT_WEIGHT * num_tokens if num_tokens else _PROMPT_WEIGHT * seq.num_prompt_tokens
        self._counters[seq.client] = self._counters.get(seq.client, self._floor) + cost
