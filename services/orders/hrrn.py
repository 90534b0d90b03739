"""Highest response ratio next: the longest wait for each predicted output token.

A short answer goes first, and a long one that has waited for as much more gets its turn. The ratio of
response time to service time is `1 + wait / service`; the time of a token is the same for all and drops out.
A group of `p` predicted tokens is overtaken by one of `q` that came `d` seconds later only if `q < p`, and
only from a wait of `d * p / (p - q)` on.

Source: Hansen, "An Analysis of Response Ratio Scheduling" (IFIP 1971).
"""

from __future__ import annotations

from typing import ClassVar

from adapters.base import Sequence
from services.orders.base import Group, OrderConfig, predicted_tokens


class Hrrn:
    name: ClassVar[str] = "hrrn"

    def __init__(self, config: OrderConfig) -> None:
        pass

    def arrange(self, groups: list[Group], now_s: float) -> list[Group]:
        return sorted(groups, key=lambda group: (group[0].arrival_s - now_s) / predicted_tokens(group))

    def served(self, seq: Sequence, num_tokens: int) -> None:
        pass
