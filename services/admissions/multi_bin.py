"""Multi-bin: those join together whose answers are expected to be of like length, within a factor of two.

For `dynamic`, whose batch runs to its end: one of like lengths has few dead rows, and where the bin of the
first has fewer than a batch, slots stay free. `ORDER=multi_bin` brings a bin together at the head.

Source: Guldogan et al., "Multi-Bin Batching for Increasing LLM Inference Throughput" (arXiv 2412.04504).
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from itertools import takewhile
from typing import ClassVar

from adapters.base import Sequence


class MultiBin:
    name: ClassVar[str] = "multi_bin"

    def most(self, waiting: Seq[Sequence], num_running: int, max_batch: int) -> int:
        first = waiting[0].length_bin
        return sum(1 for _ in takewhile(lambda seq: seq.length_bin == first, waiting[:max_batch]))
