"""First come, first served, by priority with aging: the default.

At time `t` a group has the rank `priority + (t - arrival_s) / aging_s`, and the highest rank is first. All
ranks grow equally fast, so `arrival_s - priority * aging_s` sorts them without a clock.

The longest wait: with priorities 0 to 2, a group of priority `p` is overtaken only by groups that arrive less
than `(2 - p) * aging_s` after it. No one overtakes a group that has waited `2 * aging_s`.

Source: the order of arrival is that of Orca (Yu et al., OSDI 2022) and the default of vLLM, whose order by
priority does not age.
"""

from __future__ import annotations

from typing import ClassVar

from services.orders.base import Group, OrderConfig


class Fcfs:
    name: ClassVar[str] = "fcfs"

    def __init__(self, config: OrderConfig) -> None:
        self._aging_s = config.aging_s

    def sort_key(self, group: Group) -> float:
        return group[0].arrival_s - group[0].priority * self._aging_s
