"""From the chunks of a step to packed rows: decode rows by slot, then prompt blocks, then padding.

Padding rows fill the step up to a row count whose bits were found to agree; they write to the scratch slot.
The packer owns the slots: a sequence takes one with its first chunk and keeps it until it is released.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from operator import itemgetter

import torch
from torch import Tensor

from adapters.base import KV_BLOCK, BackendError, ScheduledChunk, Sequence
from adapters.torch_backend.cpu.kernels import CpuKernels
from adapters.torch_backend.model.attention import PromptBlock, StepLayout, prompt_blocks
from adapters.torch_backend.model.kv_cache import SlotAllocator, SlotCache
from adapters.torch_backend.model.linear import ANY_ROWS

UNKNOWN = -1
"""The input id of a row whose token only the device knows."""


@dataclass(slots=True)
class RowPlan:
    """The rows of a step as lists: decode rows by slot, then prompt chunks; nothing is padded."""

    ids: list[int]
    slots: list[int]
    positions: list[int]
    num_decodes: int
    chunk_rows: list[int]
    """The first row of each prompt chunk."""
    blocks: list[PromptBlock]
    logit_rows: list[int]
    """The rows of `sampled`."""
    sampled: list[Sequence]


@dataclass(slots=True)
class PackedStep:
    """Rows of one forward pass; `logit_rows (n,)` starts with the rows of `sampled`, the rest is padding."""

    input_ids: Tensor
    layout: StepLayout
    logit_rows: Tensor
    sampled: list[Sequence]


class StepPacker:
    """Gives sequences their slots and steps their layout; `rows`, `tight`, `kernels`: as found at start."""

    overlaps = False
    """Rows may follow tokens that only the device knows."""

    def __init__(self, cache: SlotCache, max_len: int, prefill_chunk: int, device: torch.device) -> None:
        self.cache = cache
        self.slots = SlotAllocator(cache.scratch_slot)
        self.rows = ANY_ROWS
        self.tight = False
        self.kernels: CpuKernels | None = None
        self.max_len = max_len
        self._prefill_chunk = prefill_chunk
        self._device = device
        self.has_blocks = device.type == "cpu"

    def plan(self, chunks: Seq[ScheduledChunk]) -> RowPlan:
        """Order the rows of a step; sequences that begin get a slot, and a slot its sequence's blocks."""
        decodes: list[tuple[int, ScheduledChunk]] = []
        prompts: list[tuple[int, ScheduledChunk]] = []
        slot_for, max_len = self.slots.slot_for, self.max_len
        for chunk in chunks:
            seq, start = chunk.seq, chunk.start
            if start + chunk.num_tokens > max_len:
                raise BackendError(f"sequence {seq.seq_id} outgrew its {max_len} positions")
            block_ids = seq.block_ids if self.has_blocks else ()
            slot = slot_for(seq.seq_id, 0 if block_ids else start)  # they may hold what is before `start`
            if start % KV_BLOCK == 0 or chunk.num_tokens > 1:  # else it has got no block since its last row
                self.cache.place(slot, block_ids)
            is_decode = chunk.dead or start >= seq.num_prefill_tokens
            if is_decode or start + chunk.num_tokens <= len(seq.prompt_token_ids) or self.overlaps:
                (decodes if is_decode else prompts).append((slot, chunk))
                continue
            # Output that is computed again takes the path of a decode row: a prompt's has other bits.
            first = max(start, len(seq.prompt_token_ids))
            if start < first:
                prompts.append((slot, ScheduledChunk(seq, start, first - start)))
            again = range(first, start + chunk.num_tokens)
            decodes += [(slot, ScheduledChunk(seq, position, 1)) for position in again]
        # By slot, so that rows of neighbouring slots can share one attention call over one view of the cache.
        decodes.sort(key=itemgetter(0))

        plan = RowPlan([], [], [], len(decodes), [], [], [], [])
        ids, slots, positions = plan.ids, plan.slots, plan.positions
        # Without the properties of a chunk: asking each row four of them takes as long as all the rest.
        for row, (slot, chunk) in enumerate(decodes):
            seq, start = chunk.seq, chunk.start
            num_prompt, output = len(seq.prompt_token_ids), seq.output_token_ids
            index = start - num_prompt
            if index < 0:
                ids.append(seq.prompt_token_ids[start])  # a dead row that never had a token
            elif index < len(output):
                ids.append(output[index])
            else:
                ids.append(UNKNOWN if self.overlaps else 0)  # without overlap only padding has no token
            slots.append(slot)
            positions.append(start)
            if not chunk.dead and index + 1 == len(output) + seq.num_pending_tokens:
                plan.logit_rows.append(row)
                plan.sampled.append(seq)
        for slot, chunk in prompts:
            plan.chunk_rows.append(len(ids))
            plan.blocks += prompt_blocks(len(ids), slot, chunk.start, chunk.num_tokens, self._prefill_chunk)
            ids += chunk.token_ids
            slots += [slot] * chunk.num_tokens
            positions += range(chunk.start, chunk.start + chunk.num_tokens)
            if chunk.samples:
                plan.logit_rows.append(len(ids) - 1)
                plan.sampled.append(chunk.seq)
        return plan

    def padded(self, plan: RowPlan) -> tuple[list[list[int]], list[int]]:
        """`ids`, `slots` and `positions` of all rows, and logit rows, up to row counts that are safe."""
        padding = self.rows.padded(len(plan.ids)) - len(plan.ids)
        rows = [
            plan.ids + [0] * padding,
            plan.slots + [self.cache.scratch_slot] * padding,
            plan.positions + [0] * padding,
        ]
        # The output head is padded apart: it sees the sampled rows alone, which can be a single one.
        logit_rows = plan.logit_rows
        if logit_rows:
            more = self.rows.padded(len(logit_rows)) - len(logit_rows)
            logit_rows = logit_rows + [logit_rows[0]] * more
        return rows, logit_rows

    def pack(self, chunks: Seq[ScheduledChunk]) -> PackedStep:
        """Order the rows of a step and say where each reads and writes."""
        return self.packed(self.plan(chunks))

    def packed(self, plan: RowPlan) -> PackedStep:
        """The rows of `plan`, padded, as tensors."""
        rows, logit_rows = self.padded(plan)
        where = torch.tensor(rows, device=self._device)
        layout = StepLayout(
            self.cache,
            where[1],
            where[2],
            plan.num_decodes,
            plan.blocks,
            len(plan.ids),
            self.tight,
            self.kernels,
        )
        last = torch.tensor(logit_rows, dtype=torch.long, device=self._device)
        return PackedStep(where[0], layout, last, plan.sampled)
