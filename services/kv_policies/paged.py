"""Paged: blocks of 16 positions for what is there, and one more block whenever a sequence outgrows its last.

More sequences run in the same memory, as nobody holds what is only possible. When no block is free, one is
preempted. A share of the memory, the watermark, stays free when a sequence joins, so that those that run do
not preempt it at once.

Source: blocks, watermark and recomputation, vLLM (Kwon et al., SOSP 2023, arXiv 2309.06180).
"""

from __future__ import annotations

import math
from typing import ClassVar

from adapters.base import KV_BLOCK, Sequence


class Paged:
    name: ClassVar[str] = "paged"
    block_tokens: ClassVar[int] = KV_BLOCK
    grows: ClassVar[bool] = True

    def __init__(self, watermark: float) -> None:
        self._watermark = watermark

    def num_tokens(self, seq: Sequence) -> int:
        return -(-seq.num_tokens // self.block_tokens) * self.block_tokens

    def num_spare_tokens(self, capacity_tokens: int) -> int:
        num_blocks = math.ceil(self._watermark * capacity_tokens / self.block_tokens)
        return num_blocks * self.block_tokens
