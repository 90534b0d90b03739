"""Packed rows for a device beside the host: one upload a step, spans for its attention, tokens it knows.

The host may launch a row before it has seen the row's input token. Such an id is negative, and the table of
tokens by slot fills it in on the device.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from itertools import pairwise

from torch import Tensor

from adapters.base import ScheduledChunk
from adapters.torch_backend.cuda.fused import DTYPES
from adapters.torch_backend.cuda.machine import Machine
from adapters.torch_backend.cuda.step_buffers import StepBuffer, TokenTable
from adapters.torch_backend.model.attention import StepLayout
from adapters.torch_backend.model.flash_attention import (
    AttentionOp,
    FlashPart,
    FlashStep,
    KeySpans,
    decode_spans,
)
from adapters.torch_backend.model.kv_cache import SlotAllocator, SlotCache
from adapters.torch_backend.model.llama_forward import DecodeAttention
from adapters.torch_backend.packing import PackedStep, RowPlan, StepPacker


class DevicePacker(StepPacker):
    """`attention` None is the general path; `least_rows` 2 keeps to the kernel that never splits keys.

    `decode_attention`, where there is one, attends for the decode rows instead.
    """

    overlaps = True

    def __init__(self, machine: Machine, cache: SlotCache, max_len: int, prefill_chunk: int) -> None:
        super().__init__(cache, max_len, prefill_chunk, machine.device)
        self.attention: AttentionOp | None = None
        self.decode_attention: DecodeAttention | None = None
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
        cuts = self._cuts(plan)
        numbers = [self._spans(plan, cut) for cut in cuts]
        spans = [part for one in numbers for part in one]
        views = buffer.upload([*rows, logit_rows, *spans, *ints], floats)
        ids, slots, positions, last = views[:4]
        layout = StepLayout(
            self.cache, slots, positions, plan.num_decodes, plan.blocks, len(plan.ids), self.tight
        )
        if self.attention is not None:
            tensors = [view.int() for view in views[4 : 4 + len(spans)]]
            parts = []
            for cut, starts, firsts, lengths in zip(
                cuts, tensors[0::3], tensors[1::3], tensors[2::3], strict=True
            ):
                key_spans = KeySpans(starts, firsts, lengths, self._max_rows(cut))
                decodes = cut[-1] <= plan.num_decodes
                op: AttentionOp = self.attention
                if decodes and self.decode_attention is not None:
                    op = self.decode_attention
                parts.append(FlashPart(op, cut[0], cut[-1], key_spans))
            layout.flash = FlashStep(parts)
        ids = self.table.complete(ids, slots, positions)
        return PackedStep(ids, layout, last, plan.sampled), views[4 + len(spans) :]

    def decode_layout(self, slots: Tensor, positions: Tensor) -> StepLayout:
        """The layout of rows `(n,)` that decode, padding among them; reads nothing back from the device."""
        num_rows = len(slots)
        layout = StepLayout(self.cache, slots, positions, num_rows, [], num_rows, self.tight)
        op: AttentionOp | None = self.decode_attention or self.attention
        if op is not None:
            spans = decode_spans(slots, positions, self.cache.max_len, max_rows=self.least_rows)
            dtypes = DTYPES if self.decode_attention else ()
            layout.flash = FlashStep([FlashPart(op, 0, num_rows, spans)], dtypes)
        return layout

    def _cuts(self, plan: RowPlan) -> list[list[int]]:
        """Where the entries of each part begin, and where its last one ends.

        Decode rows have a call of their own: with more than one row an entry, the operator computes a whole
        tile for each of them and reads its keys once for every query head. Unless all go that way anyhow.
        """
        decodes = list(range(plan.num_decodes + 1))
        prompts = [*plan.chunk_rows, len(plan.ids)]
        if self.least_rows > 1 and self.decode_attention is None:
            return [[*decodes[:-1], *prompts]]
        return [cut for cut in (decodes, prompts) if len(cut) > 1]

    def _max_rows(self, cut: Seq[int]) -> int:
        return max(self.least_rows, *(end - start for start, end in pairwise(cut)))

    def _spans(self, plan: RowPlan, cut: Seq[int]) -> list[list[int]]:
        """The tensors of `KeySpans` as lists."""
        firsts = [plan.slots[row] * self.cache.max_len for row in cut[:-1]]
        lengths = [plan.positions[end - 1] + 1 for end in cut[1:]]
        return [[row - cut[0] for row in cut], [*firsts, 0], lengths]
