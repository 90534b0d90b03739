"""Which slot a sequence gets, and what happens to gaps between slots."""

from __future__ import annotations

import pytest

pytest.importorskip("llama_cpp", reason="needs the llama extra")

from adapters.base import SamplingParams, ScheduledChunk, Sequence
from adapters.llama_cpp_backend.slots import GAP_STEPS, MAX_GAP, SlotTable, StepRows

pytestmark = pytest.mark.llama


def table(num_slots: int, *, split: bool = True) -> SlotTable:
    return SlotTable(num_slots, 100, 100, split=split)


def start(slots: SlotTable, count: int) -> list[Sequence]:
    sequences = [Sequence(i, [1, 2], SamplingParams()) for i in range(count)]
    step(slots, sequences)
    return sequences


def step(slots: SlotTable, sequences: list[Sequence]) -> StepRows:
    chunks = [
        ScheduledChunk(s, s.num_computed_tokens, s.num_tokens - s.num_computed_tokens) for s in sequences
    ]
    rows = slots.lay_out(chunks)
    slots.commit(chunks)
    for seq in sequences:
        seq.num_computed_tokens = seq.num_tokens
        seq.output_token_ids.append(7)
    return rows


def test_rows_go_in_the_order_of_slots_and_the_lowest_free_one_is_next() -> None:
    slots = table(4)
    a, b, c = start(slots, 3)
    assert step(slots, [c, a, b]).slots == [0, 1, 2]
    assert slots.release(b.seq_id) == 1
    heir = Sequence(9, [1, 2, 3], SamplingParams())
    rows = step(slots, [a, c, heir])
    assert rows.slots == [0, 1, 1, 1, 2]
    assert (rows.wanted, [seq.seq_id for seq in rows.sampled]) == ([0, 3, 4], [0, 9, 2])


def test_a_small_gap_is_filled_with_rows_that_nobody_reads() -> None:
    slots = table(MAX_GAP + 2)
    sequences = start(slots, MAX_GAP + 2)
    for seq in sequences[1:-1]:
        slots.release(seq.seq_id)
    rows = step(slots, [sequences[0], sequences[-1]])
    assert rows.slots == list(range(MAX_GAP + 2))
    assert rows.wanted == [0, MAX_GAP + 1]
    assert rows.rewound == [(slot, 0) for slot in range(1, MAX_GAP + 1)]
    heir = Sequence(99, [1, 2], SamplingParams())
    assert (1, 0) in step(slots, [sequences[0], heir, sequences[-1]]).rewound


def test_a_large_gap_and_a_shared_cache_are_left_alone() -> None:
    for slots, released in ((table(8), MAX_GAP + 1), (table(8, split=False), 1)):
        sequences = start(slots, 8)
        for seq in sequences[1 : 1 + released]:
            slots.release(seq.seq_id)
        stay = [sequences[0], *sequences[1 + released :]]
        assert step(slots, stay).slots == [0, *range(1 + released, 8)]


def test_a_gap_that_stays_is_closed() -> None:
    slots = table(4)
    a, b, c, d = start(slots, 4)
    slots.release(b.seq_id)
    moves = [step(slots, [a, c, d]).moved for _ in range(GAP_STEPS)]
    assert moves == [None] * (GAP_STEPS - 1) + [(3, 1)]
    rows = step(slots, [a, c, d])
    assert (rows.moved, rows.slots, [s.seq_id for s in rows.sampled]) == (None, [0, 1, 2], [0, 3, 2])
    assert slots.release(d.seq_id) == 1


def test_a_gap_that_a_newcomer_fills_moves_nobody() -> None:
    slots = table(4)
    sequences = start(slots, 4)
    for number in range(3 * GAP_STEPS):
        slots.release(sequences[1].seq_id)
        stay = [sequences[0], *sequences[2:]]
        assert step(slots, stay).moved is None
        sequences[1] = Sequence(100 + number, [1], SamplingParams())
        assert step(slots, sequences).moved is None
