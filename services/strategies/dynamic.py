"""Dynamic: the service collects a batch until it is full or the oldest request has waited long enough.

A batch runs to its end before the next one starts. While draining no further request comes, so it does not
wait for any.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import ClassVar

from adapters.base import Sequence
from services.strategies.base import Admission, StrategyConfig


class Dynamic:
    name: ClassVar[str] = "dynamic"
    keeps_finished_rows: ClassVar[bool] = True
    takes_groups: ClassVar[bool] = False
    admits_while_running: ClassVar[bool] = False

    def __init__(self, config: StrategyConfig) -> None:
        self._max_batch = config.max_batch
        self._batch_wait_s = config.batch_wait_s

    def admit(
        self, waiting: Seq[Sequence], running: Seq[Sequence], *, now_s: float, draining: bool
    ) -> Admission:
        if running:
            return Admission(0)
        if draining or len(waiting) >= self._max_batch:
            return Admission(self._max_batch)
        starts_at_s = min(seq.arrival_s for seq in waiting) + self._batch_wait_s
        if now_s < starts_at_s:
            return Admission(0, recheck_at_s=starts_at_s)
        return Admission(len(waiting))
