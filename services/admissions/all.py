"""All: everybody joins whom the strategy lets in. The default.

Source: Orca (Yu et al., OSDI 2022), which fills its batch at each iteration.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import ClassVar

from adapters.base import Sequence


class All:
    name: ClassVar[str] = "all"

    def most(self, waiting: Seq[Sequence], num_running: int, max_batch: int) -> int:
        return len(waiting)
