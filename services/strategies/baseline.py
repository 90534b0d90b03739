"""Baseline: one sequence at a time. The yardstick for every other strategy.

A sequence runs from its first to its last token alone, whatever MAX_BATCH is.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import ClassVar

from adapters.base import Sequence
from services.strategies.base import Admission, StrategyConfig


class Baseline:
    name: ClassVar[str] = "baseline"
    keeps_finished_rows: ClassVar[bool] = False
    takes_groups: ClassVar[bool] = False
    admits_while_running: ClassVar[bool] = False

    def __init__(self, config: StrategyConfig) -> None:
        pass

    def admit(
        self, waiting: Seq[Sequence], running: Seq[Sequence], *, now_s: float, draining: bool
    ) -> Admission:
        return Admission(0 if running else 1)
