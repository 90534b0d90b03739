"""The scheduler's steps on a virtual clock: how prompts are cut, how answers end, what dead rows do.

Its limits, its queue and what holds for any traffic have files of their own.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from adapters.base import SamplingParams, SequenceState
from services.strategies.continuous import Continuous
from tests.services.virtual_lab import EOS, LIMITS, WORD, VirtualLab


class PaddedRefill(Continuous):
    keeps_finished_rows = True


# -- chunks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("max_step_tokens", "prompt", "chunks"),
    [
        (64, 3, [3]),
        (64, 8, [8]),
        (64, 64, [64]),
        (64, 65, [64, 1]),
        (12, 21, [8, 8, 5]),
        (30, 61, [24, 24, 13]),
    ],
)
def test_a_prompt_is_cut_at_multiples(max_step_tokens: int, prompt: int, chunks: list[int]) -> None:
    lab = VirtualLab("continuous", limits=replace(LIMITS, max_step_tokens=max_step_tokens))
    lab.submit(1, prompt=prompt)
    seen = []
    while plan := lab.step().chunks:
        seen.append(plan[0].num_tokens)
    assert seen == chunks


def test_prompts_share_a_step_shortest_first_after_decode_rows() -> None:
    lab = VirtualLab("continuous", limits=replace(LIMITS, max_step_tokens=26))
    lab.submit(9, prompt=2)
    lab.step()
    lab.submit(9, prompt=20)
    lab.submit(9, prompt=12)
    lab.submit(9, prompt=4)

    steps = [[(c.seq.seq_id, c.start, c.num_tokens) for c in lab.step().chunks] for _ in range(3)]
    assert steps == [
        [(0, 2, 1), (3, 0, 4), (2, 0, 12), (1, 0, 8)],  # of 1, whole chunks only
        [(0, 3, 1), (2, 12, 1), (3, 4, 1), (1, 8, 12)],
        [(0, 4, 1), (1, 20, 1), (2, 13, 1), (3, 5, 1)],
    ]


def test_a_short_prompt_does_not_wait_for_all_of_a_long_one_and_that_one_moves() -> None:
    lab = VirtualLab("continuous", limits=replace(LIMITS, max_step_tokens=20))
    (long,) = lab.submit(1, prompt=200)
    lab.step()
    for _ in range(5):
        before = long.num_computed_tokens
        (short,) = lab.submit(1, prompt=7)
        lab.step()
        assert short.output_token_ids
        assert long.num_computed_tokens >= before + LIMITS.prefill_chunk


def test_a_long_prompt_does_not_hold_up_the_next_token() -> None:
    lab = VirtualLab("continuous", limits=replace(LIMITS, max_step_tokens=12))
    (talker,) = lab.submit(100)
    lab.step()
    lab.submit(1, prompt=200)
    for _ in range(10):
        before = len(talker.output_token_ids)
        lab.step()
        assert len(talker.output_token_ids) == before + 1


LONG = replace(LIMITS, long_prefill_token_threshold=20)


def chunks_of(lab: VirtualLab) -> dict[int, tuple[int, int]]:
    """Start and number of tokens by sequence."""
    return {chunk.seq.seq_id: (chunk.start, chunk.num_tokens) for chunk in lab.step().chunks}


def test_above_the_threshold_prompts_share_a_chunk_for_each_while_others_decode() -> None:
    lab = VirtualLab("continuous", limits=LONG)
    lab.submit(5)  # decodes in steps 2 to 5
    lab.step()
    lab.submit(9, prompt=30)
    lab.submit(9, prompt=20)  # not above it
    assert chunks_of(lab) == {0: (3, 1), 2: (0, 20), 1: (0, 8)}
    lab.submit(9, prompt=21)
    # Two chunks, the fewest left first; but one is for whom was admitted first.
    assert chunks_of(lab) == {0: (4, 1), 2: (20, 1), 1: (8, 8), 3: (0, 8)}
    assert chunks_of(lab) == {0: (5, 1), 2: (21, 1), 1: (16, 8), 3: (8, 8)}
    assert chunks_of(lab) == {0: (6, 1), 2: (22, 1), 1: (24, 6), 3: (16, 5)}


def test_a_prompt_just_above_the_threshold_does_not_wait_for_a_much_longer_one() -> None:
    lab = VirtualLab("continuous", limits=LONG)
    lab.submit(99)
    lab.step()
    lab.submit(1, prompt=400)
    lab.step()
    (shorter,) = lab.submit(1, prompt=24)
    for _ in range(3):
        lab.step()
    assert shorter.output_token_ids


def test_where_most_prompts_are_long_the_batch_stays_full() -> None:
    """In balance, so many decode that as many prompts begin as end."""
    lab = VirtualLab("continuous", limits=replace(LONG, max_batch=16, max_step_tokens=256))
    for _ in range(200):
        lab.submit(30, prompt=64)
    for _ in range(150):
        lab.step()
    rows = [len(live) for live, _ in lab.batches[50:]]
    decoding = [sum(c.is_decode for c in lab.step().chunks) for _ in range(50)]
    assert min(rows) >= 12
    assert sum(decoding) / len(decoding) > 9


def test_where_nobody_decodes_a_long_prompt_takes_the_whole_step() -> None:
    lab = VirtualLab("continuous", limits=LONG)
    lab.submit(2)
    lab.step()
    lab.submit(1, prompt=60)
    assert chunks_of(lab) == {0: (3, 1), 1: (0, 8)}
    assert chunks_of(lab) == {1: (8, 52)}


def test_a_long_prompt_goes_on_at_multiples_of_a_chunk() -> None:
    lab = VirtualLab("continuous", limits=replace(LONG, max_step_tokens=30))
    lab.submit(1, prompt=45)
    (short,) = lab.submit(9, prompt=6)
    assert chunks_of(lab) == {1: (0, 6), 0: (0, 24)}
    assert chunks_of(lab) == {1: (6, 1), 0: (24, 8)}
    assert short.output_token_ids


# -- ends -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "params", "output", "reason"),
    [
        ([[WORD], [WORD], [WORD]], SamplingParams(), [WORD] * 3, "length"),
        ([[WORD], [EOS]], SamplingParams(), [WORD, EOS], "stop"),
        ([[WORD], [WORD], [EOS]], SamplingParams(), [WORD, WORD, EOS], "stop"),
        ([[EOS], [EOS], [WORD]], SamplingParams(ignore_eos=True), [EOS, EOS, WORD], "length"),
        ([[WORD, WORD], [WORD, WORD]], SamplingParams(), [WORD] * 3, "length"),
        ([[WORD, EOS, WORD]], SamplingParams(), [WORD, EOS], "stop"),
        ([[5, EOS], [WORD]], SamplingParams(ignore_eos=True), [5, EOS, WORD], "length"),
    ],
)
def test_how_an_answer_ends(
    tokens: list[list[int]], params: SamplingParams, output: list[int], reason: str
) -> None:
    script = iter(tokens)
    lab = VirtualLab("continuous", model=lambda seq: next(script))
    (seq,) = lab.submit(3, params=params)
    lab.run()
    updates = lab.published[seq.seq_id]
    assert [token_id for update in updates for token_id in update.token_ids] == output
    assert seq.output_token_ids == output
    assert [update.finish_reason for update in updates] == [None] * (len(updates) - 1) + [reason]
    assert (seq.state, seq.finish_reason) == (SequenceState.FINISHED, reason)
    assert lab.released == [seq.seq_id]
    assert lab.scheduler.kv_used_tokens == 0


def test_a_backend_that_gives_no_token_ends_the_sequence_with_an_error() -> None:
    lab = VirtualLab("continuous", model=lambda seq: [] if seq.seq_id == 1 else [WORD])
    lab.submit(2, 2)
    lab.step()
    assert [(u.finish_reason, u.error) for u in lab.published[1]] == [
        ("error", "the backend computed this sequence but gave no token")
    ]
    assert lab.released == [1]
    lab.run()
    assert lab.published[0][-1].finish_reason == "length"


def test_a_failed_step_ends_its_own_sequences_only() -> None:
    lab = VirtualLab("continuous", limits=replace(LIMITS, max_step_tokens=12))
    lab.submit(1, prompt=8)
    lab.submit(1, prompt=8)  # no room in the first step
    lab.submit(1, prompt=4)
    lab.fail_step()
    assert [(u.seq_id, u.finish_reason, u.error) for id_ in (0, 2) for u in lab.published[id_]] == [
        (0, "error", "out of order"),
        (2, "error", "out of order"),
    ]
    assert lab.released == [0, 2]
    lab.run()
    assert lab.published[1][-1].finish_reason == "length"


def test_a_failed_step_of_a_padded_batch_frees_its_dead_rows_too() -> None:
    lab = VirtualLab("static")
    lab.submit(1, 5)
    lab.step()
    assert lab.released == []
    lab.fail_step()
    assert sorted(lab.released) == [0, 1]
    assert len(lab.published[0]) == 1


def test_a_failed_step_spares_the_rest_of_a_padded_batch() -> None:
    lab = VirtualLab("static", limits=replace(LIMITS, max_step_tokens=12))
    lab.submit(1, 5, 5, prompt=8)
    lab.step()
    lab.fail_step()  # the first row is dead by now, the second reads its prompt, the third has no room yet
    assert lab.released == [0, 1]
    lab.run()
    assert len(lab.sequences[2].output_token_ids) == 5


# -- dead rows ------------------------------------------------------------------------------------


def test_finished_rows_stay_dead_at_their_last_position_until_the_batch_is_done() -> None:
    lab = VirtualLab("static")
    lab.submit(1, 2, 4, prompt=3)
    lab.submit(1)
    plans = [lab.step() for _ in range(4)]
    dead = [[(c.seq.seq_id, c.start, c.num_tokens) for c in plan.chunks if c.dead] for plan in plans]
    assert dead == [[], [(0, 2, 1)], [(0, 2, 1), (1, 3, 1)], [(0, 2, 1), (1, 3, 1)]]
    assert [plan.num_rows for plan in plans] == [3, 2, 1, 1]
    assert [plan.num_decode_tokens for plan in plans] == [0, 2, 1, 1]
    assert lab.released == [0, 1, 2]
    assert [len(lab.published[seq_id]) for seq_id in range(3)] == [1, 2, 4]
    assert lab.step().chunks[0].seq.seq_id == 3


def test_dead_rows_do_not_count_as_company() -> None:
    lab = VirtualLab("static")
    *_, longest = lab.submit(1, 2, 4)
    lab.run()
    timings = lab.published[longest.seq_id][-1].timings
    assert timings is not None
    assert (timings.num_steps, timings.mean_batch_size) == (4, (3 + 2 + 1 + 1) / 4)


def test_num_running_counts_the_living_and_kv_the_dead_too() -> None:
    lab = VirtualLab("static")
    lab.submit(1, 5)
    lab.step()
    assert (lab.scheduler.num_running, lab.scheduler.kv_used_tokens) == (1, 3 + 1 + 3 + 5)


@pytest.mark.parametrize("pad_finished", [True, False])
def test_cancelling_a_row_ends_it_at_once_and_its_slot_with_the_batch(pad_finished: bool) -> None:
    lab = VirtualLab("static", limits=replace(LIMITS, pad_finished=pad_finished))
    first, second = lab.submit(9, 3)
    lab.step()
    outcome = lab.cancel(first)
    assert [(u.seq_id, u.token_ids, u.finish_reason) for u in outcome.updates] == [(0, [], "abort")]
    assert outcome.released_seq_ids == ([] if pad_finished else [0])
    assert lab.step().num_dead_rows == pad_finished
    lab.run()
    assert sorted(lab.released) == [0, 1]
    assert len(second.output_token_ids) == 3


def test_a_batch_of_dead_rows_only_is_released_and_not_computed() -> None:
    lab = VirtualLab("static")
    lab.submit(1, 5, 5)
    lab.step()
    lab.cancel(lab.sequences[1])
    assert lab.cancel(lab.sequences[2]).released_seq_ids == [0, 1, 2]
    assert lab.step().chunks == []


def test_a_row_cancelled_in_mid_prompt_stays_dead_where_it_stopped() -> None:
    lab = VirtualLab("static", limits=replace(LIMITS, max_step_tokens=12))
    half_read, other = lab.submit(5, 5, prompt=20)
    lab.step()
    lab.cancel(half_read)
    chunks = lab.step().chunks
    assert [(c.seq.seq_id, c.start, c.num_tokens, c.dead) for c in chunks] == [
        (0, 7, 1, True),
        (1, 0, 8, False),
    ]
    lab.run()
    assert len(other.output_token_ids) == 5


def test_a_row_cancelled_before_its_first_chunk_leaves_even_a_padded_batch() -> None:
    lab = VirtualLab("static", limits=replace(LIMITS, max_step_tokens=12))
    _, unread = lab.submit(5, 5, prompt=20)
    lab.step()
    assert lab.cancel(unread).released_seq_ids == [1]


def test_dead_rows_keep_their_slots_from_newcomers() -> None:
    lab = VirtualLab(PaddedRefill)
    lab.submit(1, 1, 1, 4)
    lab.step()
    lab.submit(1)
    lab.run()
    assert lab.batches[1:] == [([3], [0, 1, 2])] * 3 + [([4], [])]


# -- cancelling -----------------------------------------------------------------------------------


@pytest.mark.parametrize("num_steps", [0, 1, 2, 4], ids=["waiting", "mid-prompt", "prompt", "decode"])
def test_a_cancel_frees_everything_at_once(num_steps: int) -> None:
    lab = VirtualLab("continuous", limits=replace(LIMITS, max_step_tokens=12))
    (seq,) = lab.submit(50, prompt=16)
    for _ in range(num_steps):
        lab.step()
    outcome = lab.cancel(seq, reason="stop")
    assert [(u.seq_id, u.finish_reason) for u in outcome.updates] == [(0, "stop")]
    assert outcome.released_seq_ids == ([0] if num_steps else [])
    scheduler = lab.scheduler
    assert (scheduler.queue_depth, scheduler.num_running, scheduler.kv_used_tokens) == (0, 0, 0)
    assert lab.step().chunks == []


def test_cancelling_the_unknown_or_the_finished_is_ignored() -> None:
    lab = VirtualLab("continuous")
    (seq,) = lab.submit(1)
    lab.run()
    outcome = lab.scheduler.cancel([seq.seq_id, 999], lab.now_s)
    assert (outcome.updates, outcome.released_seq_ids) == ([], [])


# -- alone ----------------------------------------------------------------------------------------


def test_an_exclusive_sequence_takes_every_second_step_and_holds_up_nobody() -> None:
    lab = VirtualLab("continuous")
    lab.submit(20)
    lab.step()
    lab.submit(2, exclusive=True)
    lab.submit(2)
    lab.run()
    alone, shared, alone_again, *rest = [live for live, _ in lab.batches[1:]]
    assert (alone, shared, alone_again) == ([1], [0, 2], [1])
    assert rest[0] == [0, 2]
    assert lab.now_s == 22


def test_exclusive_sequences_take_turns() -> None:
    lab = VirtualLab("continuous")
    for _ in range(2):
        lab.submit(3, exclusive=True)
    lab.submit(6)
    lab.run()
    assert [live for live, _ in lab.batches] == [[0], [2], [1], [2]] * 3


def test_beside_a_running_batch_an_exclusive_long_prompt_goes_chunk_by_chunk() -> None:
    lab = VirtualLab("continuous", limits=LONG)
    lab.submit(50)
    lab.step()
    lab.submit(1, prompt=60, exclusive=True)
    assert [chunks_of(lab) for _ in range(3)] == [{1: (0, 8)}, {0: (3, 1)}, {1: (8, 8)}]


def test_an_exclusive_sequence_leaves_a_padded_batch_when_it_ends() -> None:
    lab = VirtualLab("dynamic", batch_wait_s=0.0)
    lab.submit(1, exclusive=True)
    lab.submit(2)
    lab.submit(1)
    lab.step()
    assert lab.released == [0]
    lab.run()
    assert lab.batches == [([0], []), ([1, 2], []), ([1], [2])]
