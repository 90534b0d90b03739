"""Earliest deadline first: the first token is due `EDF_TTFT_MS` after the arrival, by class of service.

A request's priority names its class. A group is overtaken only by groups that arrive less than the
difference of the two classes' deadlines after it.

Source: Liu and Layland, "Scheduling Algorithms for Multiprogramming in a Hard-Real-Time Environment"
(J. ACM 1973).
"""

from __future__ import annotations

from typing import ClassVar

from services.orders.base import Group, OrderConfig


class Edf:
    name: ClassVar[str] = "edf"

    def __init__(self, config: OrderConfig) -> None:
        self._slo_ttft_s = config.slo_ttft_s

    def sort_key(self, group: Group) -> float:
        return group[0].arrival_s + self._slo_ttft_s[group[0].priority]
