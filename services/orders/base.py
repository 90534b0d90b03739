"""The one question of an order: how do the requests that wait stand in the queue?

An order sees groups: the sequences of one request, which stay side by side. It never says *how many* join,
which is the strategy's answer, and it changes no sequence. A fixed order gives each group a key that holds
for as long as the group waits. A changing order arranges the queue anew before sequences join.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

from adapters.base import Sequence

Group = Seq[Sequence]


@dataclass(frozen=True, slots=True)
class OrderConfig:
    """The settings an order may use."""

    aging_s: float = 10.0
    """Waiting this long is worth one level of priority; 0 ignores priorities."""
    slo_ttft_s: tuple[float, float, float] = (10.0, 2.0, 0.5)
    """When the first token is due after the arrival, for priorities 0, 1 and 2."""


class FixedOrder(Protocol):
    name: ClassVar[str]

    def __init__(self, config: OrderConfig) -> None: ...

    def sort_key(self, group: Group) -> float:
        """The lowest key stands first, and equal keys stand as they came."""
        ...


@runtime_checkable
class ChangingOrder(Protocol):
    name: ClassVar[str]

    def __init__(self, config: OrderConfig) -> None: ...

    def arrange(self, groups: list[Group], now_s: float) -> list[Group]:
        """All of `groups`, the next one first. They are given as they stood last, new ones at the end."""
        ...

    def served(self, seq: Sequence, num_tokens: int) -> None:
        """`seq` got output tokens; 0 says that it has joined the batch."""
        ...


QueueOrder = FixedOrder | ChangingOrder


def predicted_tokens(group: Group) -> float:
    """How long a group is expected to run, in output tokens: as long as its longest sequence."""
    if len(group) == 1:
        return group[0].predicted_tokens
    return max(seq.predicted_tokens for seq in group)
