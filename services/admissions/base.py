"""The one question of an admission: of those that the strategy lets in, how many join now?

It cuts the strategy's answer and never adds to it. Strategies that take groups are not asked: a group joins
whole.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import ClassVar, Protocol

from adapters.base import Sequence


class AdmissionPolicy(Protocol):
    name: ClassVar[str]

    def most(self, waiting: Seq[Sequence], num_running: int, max_batch: int) -> int:
        """The most of `waiting`, from its head on, that may join beside those that run.

        At least 1 when nothing runs and somebody waits: nobody else would let him in.
        """
        ...
