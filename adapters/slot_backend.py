"""A backend over a decoder that takes rows of equal length in neighbouring slots of one cache.

A mixed step is therefore several runs: one for neighbouring decode rows, and one for each prompt chunk. A
sequence gets the lowest free slot; free slots between decode rows are computed as idle rows, which costs less
than a second run. Tokens are chosen by the lab's own rule, so that seeds mean the same as with torch.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from adapters.base import BackendInfo, ScheduledChunk, StepOutput
from adapters.chunks import check_chunks
from adapters.sampling import sampled_outputs

_MAX_GAP = 3
"""Free slots between two rows that are computed for nothing, rather than to cut the run in two."""


class SlotDecoder(Protocol):
    def run(self, first_slot: int, token_ids: NDArray[np.int64], lengths: list[int]) -> NDArray[np.float32]:
        """Compute `token_ids (rows, tokens)` of the slots from `first_slot` on.

        `lengths` are the tokens of each row in the cache after the run; a second run of the same tokens
        changes nothing. Returns logits `(rows, vocabulary)` of the last token of each row.

        Raises:
            BackendError: the run failed.
        """
        ...


class SlotBackend:
    """What is left to a backend is to load its decoder and to say what it is."""

    def __init__(self, decoder: SlotDecoder, info: BackendInfo) -> None:
        self._decoder = decoder
        details = {**info.details, "runs": "one for the decode rows, one for each prompt chunk"}
        self._info = replace(info, has_logprobs=True, details=details)
        self._slot_of: dict[int, int] = {}
        self._num_cached: dict[int, int] = {}
        self._free = list(range(info.max_batch_size))

    @property
    def info(self) -> BackendInfo:
        return self._info

    def step(self, chunks: Seq[ScheduledChunk]) -> list[StepOutput]:
        check_chunks(chunks, self._num_cached, self._info.max_batch_size, self._info.max_model_len)
        for chunk in chunks:
            if chunk.seq.seq_id not in self._slot_of:
                self._slot_of[chunk.seq.seq_id] = self._free.pop(0)
                self._num_cached[chunk.seq.seq_id] = 0
        outputs = []
        for first_slot, rows in self._runs(chunks):
            width = 1 if len(rows) > 1 else rows[0].num_tokens if rows[0] else 1
            tokens = np.zeros((len(rows), width), dtype=np.int64)
            lengths = [1] * len(rows)
            for index, row in enumerate(rows):
                if row is not None:
                    tokens[index] = row.token_ids
                    lengths[index] = row.start + row.num_tokens
            logits = self._decoder.run(first_slot, tokens, lengths)
            sampled = [(index, row.seq) for index, row in enumerate(rows) if row is not None and row.samples]
            outputs += sampled_outputs(logits, sampled)
        for chunk in chunks:  # only now: a step that failed may be given again
            self._num_cached[chunk.seq.seq_id] = chunk.start + chunk.num_tokens
        return outputs

    def release(self, seq_ids: Seq[int]) -> None:
        for seq_id in seq_ids:
            slot = self._slot_of.pop(seq_id, None)
            if slot is not None:
                del self._num_cached[seq_id]
                insort(self._free, slot)

    def close(self) -> None:
        self.release([*self._slot_of])
        del self._decoder

    def _runs(self, chunks: Seq[ScheduledChunk]) -> Iterator[tuple[int, list[ScheduledChunk | None]]]:
        """Neighbouring slots with one token each, then the longer chunks; None is an idle row."""
        single = {self._slot_of[chunk.seq.seq_id]: chunk for chunk in chunks if chunk.num_tokens == 1}
        free = set(self._free)
        slots = sorted(single)
        while slots:
            first = last = slots.pop(0)
            while slots and slots[0] - last - 1 <= _MAX_GAP and free.issuperset(range(last + 1, slots[0])):
                last = slots.pop(0)
            yield first, [single.get(slot) for slot in range(first, last + 1)]
        for chunk in chunks:
            if chunk.num_tokens > 1:
                yield self._slot_of[chunk.seq.seq_id], [chunk]
