"""Static: the batch is what one request carries, and it runs to its end before the next one starts.

A group larger than the batch runs as consecutive slices: the scheduler keeps the rest of a group that has
begun at the head of the queue.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from itertools import islice
from typing import ClassVar

from adapters.base import Sequence
from services.strategies.base import Admission, StrategyConfig


class Static:
    name: ClassVar[str] = "static"
    keeps_finished_rows: ClassVar[bool] = True
    takes_groups: ClassVar[bool] = True
    admits_while_running: ClassVar[bool] = False

    def __init__(self, config: StrategyConfig) -> None:
        self._max_batch = config.max_batch

    def admit(
        self, waiting: Seq[Sequence], running: Seq[Sequence], *, now_s: float, draining: bool
    ) -> Admission:
        if running:
            return Admission(0)
        group_id = waiting[0].group_id
        return Admission(sum(seq.group_id == group_id for seq in islice(waiting, self._max_batch)))
