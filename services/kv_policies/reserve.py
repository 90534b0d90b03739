"""Reserve: the prompt and everything the sequence may still produce, from the start. The default.

No sequence is ever preempted. A budget that is not used up is memory that nobody could use meanwhile.

Source: Orca (Yu et al., OSDI 2022), which reserves the budget of each request.
"""

from __future__ import annotations

from typing import ClassVar

from adapters.base import Sequence


class Reserve:
    name: ClassVar[str] = "reserve"
    block_tokens: ClassVar[int] = 1
    grows: ClassVar[bool] = False

    def __init__(self, watermark: float) -> None:
        pass

    def num_tokens(self, seq: Sequence) -> int:
        return seq.max_total_tokens

    def num_spare_tokens(self, capacity_tokens: int) -> int:
        return 0
