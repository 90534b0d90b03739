"""The one question of a KV policy: how many KV positions must a sequence hold before its next step?

A policy accounts for memory and decides nothing else. Where the answer grows and no memory is free, the
running batch preempts: it takes the memory of one sequence, which waits at the head of the queue and then
computes its prompt and its output so far again. This changes when tokens come, not which.
"""

from __future__ import annotations

from typing import ClassVar, Protocol

from adapters.base import Sequence


class KvPolicy(Protocol):
    name: ClassVar[str]
    block_tokens: ClassVar[int]
    """Positions that are given and taken together; `KV_BLOCK`: blocks that a backend may know by number."""
    grows: ClassVar[bool]
    """False: the answer for a sequence is always the same, so none is ever preempted."""

    def __init__(self, watermark: float) -> None: ...

    def num_tokens(self, seq: Sequence) -> int:
        """The positions `seq` must hold for its next step, a multiple of `block_tokens`.

        For a sequence that waits: the positions it must get to join.
        """
        ...

    def num_spare_tokens(self, capacity_tokens: int) -> int:
        """Positions that stay free when a sequence joins others, for those that run to grow into."""
        ...
