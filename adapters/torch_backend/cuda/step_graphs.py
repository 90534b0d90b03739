"""Decode steps as graphs: one for each of a few batch sizes, replayed over the same tensors.

A step of fewer rows is padded to the next size with rows of the scratch slot. The results lie in static
tensors, so the next replay overwrites them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from adapters.torch_backend.cuda.machine import Machine, StepGraph
from adapters.torch_backend.packing import RowPlan

MAX_ROWS = 256
"""Larger batches are rare, and their steps long enough to hide what launching them costs."""

DecodeRows = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""`ids`, `slots` and `positions (n,)` to the likeliest tokens `(n,)` and logits `(n, vocabulary)`."""


def graph_sizes(max_batch: int, multiple: int = 1) -> list[int]:
    """1, 2, 4, then multiples of 8, and the largest batch; each rounded up to a multiple of `multiple`."""
    most = min(max_batch, MAX_ROWS)
    sizes = {size for size in (1, 2, 4, *range(8, most, 8)) if size < most} | {most}
    return sorted({-(-size // multiple) * multiple for size in sizes})


class DecodeGraphs:
    """Graphs of `decode_rows` for these sizes. All calls want inference mode."""

    def __init__(
        self,
        machine: Machine,
        decode_rows: DecodeRows,
        sizes: list[int],
        scratch_slot: int,
        num_extra_words: int,
    ) -> None:
        """`num_extra_words` a row: room behind the rows' own words that other parts of the step use."""
        self.sizes = sizes
        self._machine = machine
        self._decode_rows = decode_rows
        self._scratch_slot = scratch_slot
        largest = sizes[-1]
        num_words = (3 + num_extra_words) * largest
        self.words = torch.zeros(num_words, dtype=torch.int64, device=machine.device)
        self.tokens = torch.zeros(largest, dtype=torch.int64, device=machine.device)
        self.logits: Tensor | None = None
        """`(largest, vocabulary)`."""
        self._graphs: dict[int, StepGraph] = {}

    def capture(self) -> None:
        """Compute each size once as it is and once into a graph, largest first, over scratch rows."""
        for size in reversed(self.sizes):
            rows = self.words[: 3 * size].view(3, size)
            rows.zero_()
            rows[1] = self._scratch_slot
            self._run(size)
            graph = self._machine.graph()
            graph.capture(lambda size=size: self._run(size))  # type: ignore[misc]
            self._graphs[size] = graph

    def size_for(self, num_rows: int) -> int | None:
        """The smallest size that holds so many rows, if there is one."""
        return next((size for size in self.sizes if size >= num_rows), None)

    def padded(self, size: int, plan: RowPlan) -> list[list[int]]:
        """The words of a step's rows, to be uploaded to the front of `words`."""
        padding = size - len(plan.ids)
        return [
            plan.ids + [0] * padding,
            plan.slots + [self._scratch_slot] * padding,
            plan.positions + [0] * padding,
        ]

    def replay(self, size: int) -> None:
        """Compute the rows whose words were uploaded; `tokens` and `logits` then hold theirs in front."""
        self._graphs[size].replay()

    def _run(self, size: int) -> None:
        ids, slots, positions = self.words[: 3 * size].view(3, size)
        tokens, logits = self._decode_rows(ids, slots, positions)
        if self.logits is None:
            shape = (self.sizes[-1], logits.shape[1])
            self.logits = torch.zeros(shape, dtype=logits.dtype, device=logits.device)
        self.logits[:size].copy_(logits)
        self.tokens[:size].copy_(tokens)
