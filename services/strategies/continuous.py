"""Continuous: every free slot is refilled at every step, and a finished row leaves at once.

No sequence waits for another, not even for one of the same request. What a step then carries is the layout's
answer, for all strategies alike: by default decode rows first, then chunks of prompts, short ones first.
Source: iteration-level scheduling, Orca (Yu et al., OSDI 2022); decode-first chunked prefill, Sarathi-Serve
(Agrawal et al., OSDI 2024).
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import ClassVar

from adapters.base import Sequence
from services.strategies.base import Admission, StrategyConfig


class Continuous:
    name: ClassVar[str] = "continuous"
    keeps_finished_rows: ClassVar[bool] = False
    takes_groups: ClassVar[bool] = False
    admits_while_running: ClassVar[bool] = True

    def __init__(self, config: StrategyConfig) -> None:
        self._max_batch = config.max_batch

    def admit(
        self, waiting: Seq[Sequence], running: Seq[Sequence], *, now_s: float, draining: bool
    ) -> Admission:
        return Admission(self._max_batch - len(running))
