"""From the chunks of a step to packed rows and the places they read and write.

What enters are chunks in any order; what leaves are input ids `(T,)` and a `StepLayout`: decode rows by slot,
then prompt blocks, then padding up to a row count whose bits were found to agree. Owns the slots.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch
from torch import Tensor

from adapters.base import BackendError, ScheduledChunk, Sequence
from adapters.torch_backend.attention import PromptBlock, StepLayout, prompt_blocks
from adapters.torch_backend.cpu_kernels import CpuKernels
from adapters.torch_backend.kv_cache import SlotAllocator, SlotCache
from adapters.torch_backend.linear import ANY_ROWS


@dataclass(slots=True)
class PackedStep:
    """Rows of one forward pass; `logit_rows (n,)` starts with the rows of `sampled`, the rest is padding."""

    input_ids: Tensor
    layout: StepLayout
    logit_rows: Tensor
    sampled: list[Sequence]


class StepPacker:
    """Gives sequences their slots and steps their layout; `rows`, `tight`, `kernels`: as found at start."""

    def __init__(self, cache: SlotCache, max_len: int, prefill_chunk: int, device: torch.device) -> None:
        self.cache = cache
        self.slots = SlotAllocator(cache.scratch_slot)
        self.rows = ANY_ROWS
        self.tight = False
        self.kernels: CpuKernels | None = None
        self.max_len = max_len
        self._prefill_chunk = prefill_chunk
        self._device = device

    def pack(self, chunks: Seq[ScheduledChunk]) -> PackedStep:
        """Order the rows of a step and say where each reads and writes."""
        decodes: list[tuple[int, ScheduledChunk]] = []
        prompts: list[tuple[int, ScheduledChunk]] = []
        for chunk in chunks:
            if chunk.start + chunk.num_tokens > self.max_len:
                raise BackendError(f"sequence {chunk.seq.seq_id} outgrew its {self.max_len} places")
            slot = self.slots.slot_for(chunk.seq.seq_id, chunk.start)
            (decodes if chunk.dead or chunk.is_decode else prompts).append((slot, chunk))
        decodes.sort(key=lambda item: item[0])

        ids: list[int] = []
        slots: list[int] = []
        positions: list[int] = []
        logit_rows: list[int] = []
        sampled: list[Sequence] = []
        blocks: list[PromptBlock] = []
        for slot, chunk in decodes:
            ids.append(chunk.seq.token_at(chunk.start))
            slots.append(slot)
            positions.append(chunk.start)
        for row, (_, chunk) in enumerate(decodes):
            if chunk.samples:
                logit_rows.append(row)
                sampled.append(chunk.seq)
        for slot, chunk in prompts:
            blocks += prompt_blocks(len(ids), slot, chunk.start, chunk.num_tokens, self._prefill_chunk)
            ids += chunk.token_ids
            slots += [slot] * chunk.num_tokens
            positions += range(chunk.start, chunk.start + chunk.num_tokens)
            if chunk.samples:
                logit_rows.append(len(ids) - 1)
                sampled.append(chunk.seq)

        num_rows = len(ids)
        padding = self.rows.padded(num_rows) - num_rows
        ids += [0] * padding
        slots += [self.cache.scratch_slot] * padding
        positions += [0] * padding
        if logit_rows:
            logit_rows += [logit_rows[0]] * (self.rows.padded(len(logit_rows)) - len(logit_rows))
        where = torch.tensor((ids, slots, positions), device=self._device)
        layout = StepLayout(
            self.cache, where[1], where[2], len(decodes), blocks, num_rows, self.tight, self.kernels
        )
        rows = torch.tensor(logit_rows, dtype=torch.long, device=self._device)
        return PackedStep(where[0], layout, rows, sampled)
