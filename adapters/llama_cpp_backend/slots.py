"""Which sequence holds which slot of the KV cache, and in what order a step's rows go.

A slot is one of llama.cpp's sequence ids. With a cache split by sequence, llama.cpp computes rows together
only where their slots are neighbours. So a new sequence gets the lowest free slot, rows go in the order of
slots, a small gap is filled with a row that nobody reads, and a gap that stays is closed by moving the last
sequence into it.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from adapters.base import CapacityError, ScheduledChunk, Sequence
from adapters.chunks import check_chunks

MAX_GAP = 3
"""Free slots between two used ones that are filled: up to here an idle row costs less than a second pass."""

GAP_STEPS = 4
"""A gap this old is closed. By then a waiting request would have filled it; a move copies a whole slot."""


@dataclass(slots=True)
class StepRows:
    """The tokens of one step. `wanted` are the rows whose logits `sampled` (same order) draw from."""

    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    wanted: list[int] = field(default_factory=list)
    sampled: list[Sequence] = field(default_factory=list)
    rewound: list[tuple[int, int]] = field(default_factory=list)
    """Slots, and the position from which on their cache is to be cleared before the step."""
    moved: tuple[int, int] | None = None
    """The cache of the first slot goes to the second, which is free, before everything else."""


class SlotTable:
    """`split`: each slot has a cache of its own, so that neighbours matter."""

    def __init__(self, num_slots: int, max_model_len: int, max_step_tokens: int, *, split: bool) -> None:
        self._max_model_len = max_model_len
        self._max_step_tokens = max_step_tokens
        self._num_slots = num_slots
        self._split = split
        self._slot_of: dict[int, int] = {}
        self._num_cached: dict[int, int] = {}
        """Tokens in the cache of each sequence that has a slot."""
        self._free = list(range(num_slots))
        self._unclean: set[int] = set()
        self._gap_age_steps = 0

    def lay_out(self, chunks: Seq[ScheduledChunk]) -> StepRows:
        """Give every chunk its rows; new sequences get slots.

        Raises:
            BackendError: a chunk does not continue what its slot holds.
            CapacityError: too many sequences or tokens, or one longer than a slot. Nothing has changed then.
        """
        self._check(chunks)
        moved = self._close_gap(chunks) if self._split else None
        by_slot: dict[int, ScheduledChunk] = {}
        for chunk in chunks:
            seq_id = chunk.seq.seq_id
            if seq_id not in self._slot_of:
                self._slot_of[seq_id] = self._free.pop(0)
                self._num_cached[seq_id] = 0
            by_slot[self._slot_of[seq_id]] = chunk
        rows = StepRows(moved=moved)
        before: int | None = None
        for index in sorted(by_slot):
            if self._split and before is not None and index - before > 1:
                self._fill(rows, before, index)
            self._add(rows, index, by_slot[index])
            before = index
        return rows

    def commit(self, chunks: Seq[ScheduledChunk]) -> None:
        """The step was computed."""
        for chunk in chunks:
            self._num_cached[chunk.seq.seq_id] = chunk.start + chunk.num_tokens

    def roll_back(self, chunks: Seq[ScheduledChunk]) -> list[tuple[int, int]]:
        """The step failed: what of the cache is to be cleared so that it holds what it held before."""
        seq_ids = [chunk.seq.seq_id for chunk in chunks]
        return [(self._slot_of[seq_id], self._num_cached[seq_id]) for seq_id in seq_ids]

    def release(self, seq_id: int) -> int | None:
        """Take the slot back; returns it, or None where the sequence has none."""
        slot = self._slot_of.pop(seq_id, None)
        if slot is None:
            return None
        del self._num_cached[seq_id]
        insort(self._free, slot)
        return slot

    def _close_gap(self, chunks: Seq[ScheduledChunk]) -> tuple[int, int] | None:
        """Move the last sequence into the first gap, once the gap has stayed for a while."""
        last_id = max(self._slot_of, key=self._slot_of.__getitem__, default=None)
        is_joined = any(chunk.seq.seq_id not in self._slot_of for chunk in chunks)
        if last_id is None or not self._free or self._free[0] > self._slot_of[last_id] or is_joined:
            self._gap_age_steps = 0
            return None
        self._gap_age_steps += 1
        if self._gap_age_steps < GAP_STEPS:
            return None
        source, target = self._slot_of[last_id], self._free.pop(0)
        self._slot_of[last_id] = target
        self._unclean.discard(target)
        insort(self._free, source)
        return source, target

    def _add(self, rows: StepRows, index: int, chunk: ScheduledChunk) -> None:
        if chunk.dead:
            rows.rewound.append((index, chunk.start))
        elif index in self._unclean:
            self._unclean.discard(index)
            rows.rewound.append((index, 0))
        num_tokens = chunk.num_tokens
        rows.tokens += chunk.token_ids
        rows.positions += range(chunk.start, chunk.start + num_tokens)
        rows.slots += [index] * num_tokens
        if chunk.samples:
            rows.wanted.append(len(rows.tokens) - 1)
            rows.sampled.append(chunk.seq)

    def _fill(self, rows: StepRows, before: int, after: int) -> None:
        gap = range(before + 1, after)
        if len(gap) > MAX_GAP or not set(gap) <= set(self._free):
            return
        for index in gap:
            self._unclean.add(index)
            rows.rewound.append((index, 0))
            rows.tokens.append(0)
            rows.positions.append(0)
            rows.slots.append(index)

    def _check(self, chunks: Seq[ScheduledChunk]) -> None:
        check_chunks(chunks, self._num_cached, self._num_slots, self._max_model_len)
        num_tokens = sum(chunk.num_tokens for chunk in chunks)
        if num_tokens > self._max_step_tokens:
            raise CapacityError(f"a step of {num_tokens} tokens, the batch holds {self._max_step_tokens}")
