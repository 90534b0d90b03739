"""Packed rows for a device beside the host: one upload a step, spans for its attention, tokens it knows.

What enters are plans of `StepPacker` or, inside a graph, tensors that are on the device already; what leaves
are layouts whose attention is one call a layer. Owns the table of tokens by slot, from which rows take the
tokens that the host has not seen. Knows no model and no sampling.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from itertools import pairwise

from torch import Tensor

from adapters.base import ScheduledChunk
from adapters.torch_backend.attention import StepLayout
from adapters.torch_backend.flash_attention import AttentionOp, FlashStep, KeySpans, decode_spans
from adapters.torch_backend.kv_cache import SlotAllocator, SlotCache
from adapters.torch_backend.machine import Machine
from adapters.torch_backend.packing import PackedStep, RowPlan, StepPacker
from adapters.torch_backend.step_buffers import StepBuffer, TokenTable


class DevicePacker(StepPacker):
    """`attention` None is the general path; `least_rows` 2 keeps to the kernel that never splits keys."""

    overlaps = True

    def __init__(self, machine: Machine, cache: SlotCache, max_len: int, prefill_chunk: int) -> None:
        super().__init__(cache, max_len, prefill_chunk, machine.device)
        self.attention: AttentionOp | None = None
        self.least_rows = 1
        # Nothing here promises bits, so rows of different lengths may share a call of the general path.
        self.tight = True
        self._machine = machine
        self.table = TokenTable(cache.num_slots, cache.max_len, machine.device)

    def use(self, cache: SlotCache, max_len: int) -> None:
        """Go on with another, empty cache; no sequence holds a slot."""
        self.cache, self.max_len = cache, max_len
        self.slots = SlotAllocator(cache.scratch_slot)
        self.table = TokenTable(cache.num_slots, cache.max_len, self._machine.device)

    def pack(self, chunks: Seq[ScheduledChunk]) -> PackedStep:
        packed, _ = self.upload(self.plan(chunks), StepBuffer(self._machine))
        return packed

    def upload(
        self,
        plan: RowPlan,
        buffer: StepBuffer,
        ints: Seq[Seq[int]] = (),
        floats: Seq[Seq[float]] = (),
    ) -> tuple[PackedStep, list[Tensor]]:
        """One copy for the rows of a step and whatever else it needs; the views of the latter come second."""
        rows, logit_rows = self.padded(plan)
        spans, max_rows = self._spans(plan)
        views = buffer.upload([*rows, logit_rows, *spans, *ints], floats)
        ids, slots, positions, last = views[:4]
        row_starts, place_starts, lengths = (t.int() for t in views[4:7])
        layout = StepLayout(
            self.cache, slots, positions, plan.num_decodes, plan.blocks, len(plan.ids), self.tight
        )
        if self.attention is not None:
            layout.flash = FlashStep(
                self.attention, KeySpans(row_starts, place_starts, lengths, max_rows), len(plan.ids)
            )
        ids = self.table.complete(ids, slots, positions)
        return PackedStep(ids, layout, last, plan.sampled), views[7:]

    def decode_layout(self, slots: Tensor, positions: Tensor) -> StepLayout:
        """The layout of rows `(n,)` that decode, padding among them; reads nothing back from the device."""
        num_rows = len(slots)
        layout = StepLayout(self.cache, slots, positions, num_rows, [], num_rows, self.tight)
        if self.attention is not None:
            spans = decode_spans(slots, positions, self.cache.max_len, max_rows=self.least_rows)
            layout.flash = FlashStep(self.attention, spans, num_rows)
        return layout

    def _spans(self, plan: RowPlan) -> tuple[list[list[int]], int]:
        """`KeySpans` as lists, one entry for each decode row and prompt chunk."""
        starts = [*range(plan.num_decodes), *plan.chunk_rows, len(plan.ids)]
        places = [plan.slots[row] * self.cache.max_len for row in starts[:-1]]
        lengths = [plan.positions[end - 1] + 1 for end in starts[1:]]
        most = max(end - start for start, end in pairwise(starts))
        return [starts, [*places, 0], lengths], max(most, self.least_rows)
