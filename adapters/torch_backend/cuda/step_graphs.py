"""Steps as graphs: one for each of a few row counts, replayed over the same tensors.

A step of fewer rows is padded to the next size with rows of the scratch slot. The results lie in static
tensors, so the next replay overwrites them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from collections.abc import Sequence as Seq
from itertools import chain

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


class CapturedSteps(ABC):
    """Graphs of one kind of step, and the tensors that they read and write. All calls want inference mode."""

    def __init__(self, machine: Machine, sizes: list[int], num_words: int, num_tokens: int) -> None:
        """For the largest of `sizes`: so many words go up, and so many tokens come out."""
        self.sizes = sizes
        self._machine = machine
        self.words = torch.zeros(num_words, dtype=torch.int64, device=machine.device)
        self.tokens = torch.zeros(num_tokens, dtype=torch.int64, device=machine.device)
        self.logits: Tensor | None = None
        """`(num_tokens, vocabulary)`."""
        self._graphs: dict[int, StepGraph] = {}

    @abstractmethod
    def size_for(self, plan: RowPlan) -> int | None:
        """The smallest size that holds the rows of `plan`, if there is one."""

    @abstractmethod
    def padded(self, size: int, plan: RowPlan) -> list[list[int]]:
        """The words of a step's rows, to be uploaded to the front of `words`."""

    @abstractmethod
    def rows_of(self, plan: RowPlan) -> Seq[int]:
        """Where `tokens` and `logits` hold what belongs to `plan.sampled`."""

    @abstractmethod
    def _compute(self, size: int) -> tuple[Tensor, Tensor]:
        """Tokens and logits of the rows in `words`; reads nothing back."""

    def capture(self) -> None:
        """Compute each size once as it is and once into a graph, largest first, over scratch rows."""
        nothing = RowPlan([], [], [], 0, [], [], [], [])
        for size in reversed(self.sizes):
            words = torch.tensor([*chain(*self.padded(size, nothing))])
            self.words[: len(words)].copy_(words)
            self._run(size)
            graph = self._machine.graph()
            graph.capture(lambda size=size: self._run(size))  # type: ignore[misc]
            self._graphs[size] = graph

    def replay(self, size: int) -> None:
        """Compute the rows whose words were uploaded; `tokens` and `logits` then hold theirs in front."""
        self._graphs[size].replay()

    def _run(self, size: int) -> None:
        tokens, logits = self._compute(size)
        if self.logits is None:
            shape = (len(self.tokens), logits.shape[1])
            self.logits = torch.zeros(shape, dtype=logits.dtype, device=logits.device)
        self.logits[: len(logits)].copy_(logits)
        self.tokens[: len(tokens)].copy_(tokens)


class DecodeGraphs(CapturedSteps):
    """Graphs of `decode_rows`: every row decodes."""

    def __init__(
        self,
        machine: Machine,
        decode_rows: DecodeRows,
        sizes: list[int],
        scratch_slot: int,
        num_extra_words: int,
    ) -> None:
        """`num_extra_words` a row: room behind the rows' own words that other parts of the step use."""
        super().__init__(machine, sizes, (3 + num_extra_words) * sizes[-1], sizes[-1])
        self._decode_rows = decode_rows
        self._scratch_slot = scratch_slot

    def size_for(self, plan: RowPlan) -> int | None:
        return next((size for size in self.sizes if size >= len(plan.ids)), None)

    def padded(self, size: int, plan: RowPlan) -> list[list[int]]:
        padding = size - len(plan.ids)
        return [
            plan.ids + [0] * padding,
            plan.slots + [self._scratch_slot] * padding,
            plan.positions + [0] * padding,
        ]

    def rows_of(self, plan: RowPlan) -> Seq[int]:
        return plan.logit_rows

    def _compute(self, size: int) -> tuple[Tensor, Tensor]:
        ids, slots, positions = self.words[: 3 * size].view(3, size)
        return self._decode_rows(ids, slots, positions)
