"""Multi-bin: requests of like predicted length stand together, the bin of the earliest one first.

For strategies whose batch runs to its end: a batch of like lengths has few dead rows. A bin holds predictions
within a factor of two. A batch may begin in one bin and end in the next; `ADMISSION=multi_bin` keeps it in
one. The earliest request is never behind another bin, so nobody is overtaken by later requests of other bins
once all that came before it have joined.

Source: Guldogan et al., "Multi-Bin Batching for Increasing LLM Inference Throughput" (arXiv 2412.04504); its
edges are where the bins are equally full.
"""

from __future__ import annotations

from typing import ClassVar

from adapters.base import Sequence
from services.orders.base import Group, OrderConfig


class MultiBin:
    name: ClassVar[str] = "multi_bin"

    def __init__(self, config: OrderConfig) -> None:
        pass

    def arrange(self, groups: list[Group], now_s: float) -> list[Group]:
        groups = sorted(groups, key=lambda group: group[0].arrival_s)
        first_of: dict[int, int] = {}
        bins = [max(seq.length_bin for seq in group) for group in groups]
        for place, bin_ in enumerate(bins):
            first_of.setdefault(bin_, place)
        places = sorted(range(len(groups)), key=lambda place: (first_of[bins[place]], place))
        return [groups[place] for place in places]

    def served(self, seq: Sequence, num_tokens: int) -> None:
        pass
