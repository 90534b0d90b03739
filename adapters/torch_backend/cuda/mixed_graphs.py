"""Steps with prompt chunks as graphs: one for each of a few row counts, whatever the rows are.

Launching such a step operator by operator takes the host longer than a GPU needs for some hundred rows. A
graph serves any mix because what differs lies in tensors: flash attention gets up to `MAX_PROMPTS` chunks,
empty ones among them, and the decode kernel gets all rows, with no keys for the rows of prompts.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch
from torch import Tensor

from adapters.torch_backend.cuda.machine import Machine
from adapters.torch_backend.cuda.packing import DevicePacker
from adapters.torch_backend.cuda.step_graphs import CapturedSteps
from adapters.torch_backend.loading import Forward
from adapters.torch_backend.model.attention import StepLayout
from adapters.torch_backend.model.flash_attention import AttentionOp, KeySpans, covers
from adapters.torch_backend.model.llama_forward import DecodeAttention
from adapters.torch_backend.packing import RowPlan

MAX_PROMPTS = 16
_SIZES = (*range(64, 513, 64), *range(640, 1025, 128), *range(1280, 2049, 256))
_MAX_WORK = 4e12
"""Rows times weights; above, the device is busy for longer than a launch takes (on an H200: 512 rows of 8e9
weights), and rows that only pad a graph would cost time."""


@dataclass(frozen=True, slots=True)
class MixedAttention:
    """All rows of a step: `prompts` writes those of chunks, `decodes` the rest into the same tensor."""

    prompts: AttentionOp
    decodes: DecodeAttention
    prompt_spans: KeySpans
    decode_spans: KeySpans

    @staticmethod
    def covers(q: Tensor, v_cache: Tensor) -> bool:
        return covers(q.dtype, q.shape[2], v_cache.shape[3])

    def attend(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, scaling: float, window: int) -> Tensor:
        k, v, max_len = k_cache.flatten(0, 1), v_cache.flatten(0, 1), k_cache.shape[1]
        out = self.prompts(q, k, v, self.prompt_spans, max_len, scaling, window)
        return self.decodes(q, k, v, self.decode_spans, max_len, scaling, window, out)


class MixedGraphs(CapturedSteps):
    """Graphs of steps in which prompt chunks and decode rows are mixed, tokens in the order of `sampled`."""

    def __init__(
        self,
        machine: Machine,
        packer: DevicePacker,
        forward: Forward,
        decodes: DecodeAttention,
        *,
        max_batch: int,
        max_rows: int,
        num_weights: int,
        num_extra_words: int,
    ) -> None:
        """`max_batch` rows at most are sampled; `num_extra_words` as in `DecodeGraphs`."""
        assert packer.attention is not None
        most_rows = min(max_rows, _SIZES[-1], max(_SIZES[0], int(_MAX_WORK / num_weights)))
        sizes = [size for size in _SIZES if size < most_rows] + [-(-most_rows // 64) * 64]
        self._packer = packer
        self._forward = forward
        self._prompts, self._decodes = packer.attention, decodes
        self._max_logits = packer.rows.padded(max_batch)
        num_logits = self._num_logits(sizes[-1])
        num_words = sum(self._parts(sizes[-1])) + num_extra_words * num_logits
        super().__init__(machine, sizes, num_words, num_logits)

    def size_for(self, plan: RowPlan) -> int | None:
        """Where no row is sampled, one that only pads is needed: logits are computed of some row."""
        if len(plan.chunk_rows) > MAX_PROMPTS:
            return None
        num_rows, num_logits = len(plan.ids), len(plan.sampled)
        num_rows += not num_logits
        return next((s for s in self.sizes if s >= num_rows and self._num_logits(s) >= num_logits), None)

    def padded(self, size: int, plan: RowPlan) -> list[list[int]]:
        cache, padding = self._packer.cache, size - len(plan.ids)
        # Rows that only pad decode the scratch slot's first token, so that no row is left undefined.
        lengths = [position + 1 for position in plan.positions[: plan.num_decodes]]
        lengths += [0] * (len(plan.ids) - plan.num_decodes) + [1] * padding
        # Logits that nobody asked for are those of a row that has some, or of one that only pads.
        spare = plan.logit_rows[0] if plan.logit_rows else size - 1
        logit_rows = plan.logit_rows + [spare] * (self._num_logits(size) - len(plan.logit_rows))
        ends = [*plan.chunk_rows[1:], len(plan.ids)][: len(plan.chunk_rows)]
        empty = MAX_PROMPTS - len(plan.chunk_rows)
        last = ends[-1] if ends else 0
        return [
            plan.ids + [0] * padding,
            plan.slots + [cache.scratch_slot] * padding,
            plan.positions + [0] * padding,
            lengths,
            logit_rows,
            plan.chunk_rows + [last] * (empty + 1),
            [plan.slots[row] * cache.max_len for row in plan.chunk_rows] + [0] * (empty + 1),
            [plan.positions[end - 1] + 1 for end in ends] + [0] * empty,
        ]

    def rows_of(self, plan: RowPlan) -> Seq[int]:
        return range(len(plan.sampled))

    def _num_logits(self, size: int) -> int:
        return min(size, self._max_logits)

    def _parts(self, size: int) -> list[int]:
        """How many words each list of `padded` has."""
        return [*[size] * 4, self._num_logits(size), *[MAX_PROMPTS + 1] * 2, MAX_PROMPTS]

    def _compute(self, size: int) -> tuple[Tensor, Tensor]:
        packer, parts = self._packer, self._parts(size)
        words = self.words[: sum(parts)]
        ids, slots, positions, decode_lengths, logit_rows, *spans = torch.split(words, parts)
        row_starts, key_starts, lengths = (part.int() for part in spans)
        layout = StepLayout(packer.cache, slots, positions, size, [], size, packer.tight)
        every_row = torch.arange(size + 1, dtype=torch.int32, device=words.device)
        layout.flash = MixedAttention(
            self._prompts,
            self._decodes,
            KeySpans(row_starts, key_starts, lengths, size),
            KeySpans(every_row, (slots * packer.cache.max_len).int(), decode_lengths.int(), 1),
        )
        logits = self._forward(packer.table.complete(ids, slots, positions), layout, logit_rows)
        tokens = logits.argmax(-1)
        # Spare logits repeat the first row, and a product may round the copies differently. The table must
        # hold the token that the host is told.
        tokens = torch.where(logit_rows == logit_rows[0], tokens[0], tokens)
        packer.table.put(slots[logit_rows], positions[logit_rows] + 1, tokens)
        return tokens, logits
