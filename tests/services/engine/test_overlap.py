"""One step ahead of the device, on a virtual clock: order of calls, late rows, slots, failures, times."""

from __future__ import annotations

from dataclasses import replace

import pytest

from adapters.base import SamplingParams
from services.engine.messages import Cancel, Drain, Stop, Submit
from tests.services.launching_backend import EOS, STEP_S
from tests.services.overlap_lab import LIMITS, OverlapLab, request, sequence

NEVER = 10**9
"""`eos_one_in`: no token ends an answer."""


def may_stop(max_tokens: int, penalty: float = 1.0) -> SamplingParams:
    return SamplingParams(max_tokens, repetition_penalty=penalty)


def calls(lab: OverlapLab, *kinds: str) -> list[tuple[str, int]]:
    return [call for call in lab.backend.log if call[0] in kinds]


# -- order ----------------------------------------------------------------------------------------


def test_each_step_is_launched_before_the_result_of_the_one_before_is_asked_for() -> None:
    lab = OverlapLab()
    lab.run(request(1, 4))
    assert calls(lab, "launch", "result") == [
        ("launch", 0),
        ("launch", 1),
        ("result", 0),
        ("launch", 2),
        ("result", 1),
        ("launch", 3),
        ("result", 2),
        ("result", 3),
    ]


def test_without_overlap_each_result_comes_before_the_next_launch() -> None:
    lab = OverlapLab(overlap=False)
    lab.run(request(1, 3))
    assert calls(lab, "launch", "result") == [
        (what, step) for step in range(3) for what in ("launch", "result")
    ]


def test_the_device_never_waits_for_the_host() -> None:
    """Planning and launching take 30 ms here and a step 100 ms: only the first launch is not hidden."""
    overlapped, plain = OverlapLab(launch_s=0.03), OverlapLab(launch_s=0.03, overlap=False)
    for lab in (overlapped, plain):
        lab.run(request(1, 10))
    assert overlapped.updates(1)[-1][0] == pytest.approx(0.03 + 10 * STEP_S)
    assert plain.updates(1)[-1][0] == pytest.approx(10 * (0.03 + STEP_S))


def test_steps_follow_one_another_in_the_log_though_they_were_launched_earlier() -> None:
    lab = OverlapLab(launch_s=0.03)
    lab.run(request(1, 3), request(2, 1, at_s=2.0))
    records = lab.records
    assert [r.start_s - 50.0 for r in records] == pytest.approx([0.0, 0.13, 0.23, 2.0])
    assert [r.duration_s for r in records] == pytest.approx([0.13, STEP_S, STEP_S, 0.13])


def test_timings_are_of_the_moment_the_tokens_were_there() -> None:
    lab = OverlapLab(eos_one_in=NEVER)
    lab.run(request(1, 3))
    timings = lab.updates(1)[-1][1].timings
    assert timings is not None
    assert timings.first_token_s == pytest.approx(50.1)
    assert (timings.prefill_s, timings.decode_s, timings.num_steps) == (
        pytest.approx(0.1),
        pytest.approx(0.2),
        3,
    )


def test_busy_counts_from_the_launch_or_from_the_end_of_the_step_before() -> None:
    lab = OverlapLab()
    seen: list[float] = []

    def look() -> None:
        lab.clock.now_s += 0.04
        seen.append(round(lab.engine.busy_s(), 6))

    lab.backend.on_launch = look
    lab.run(request(1, 3))
    # The second launch comes in the middle of the first step, which is still the present one.
    assert seen == [0.04, 0.08, 0.04]
    assert lab.engine.busy_s() == 0.0


def test_a_tick_is_the_least_time_between_launches() -> None:
    lab = OverlapLab(tick_s=0.25)
    lab.run(request(1, 3))
    assert [record.start_s - 50.0 for record in lab.records] == pytest.approx([0.0, 0.25, 0.5])
    assert [at_s for at_s, _ in lab.updates(1)] == pytest.approx([0.1, 0.35, 0.6])


def test_who_arrives_while_two_steps_are_launched_joins_the_third() -> None:
    lab = OverlapLab(eos_one_in=NEVER)
    lab.run(request(1, 5), request(2, 1, at_s=0.05))
    assert [[seq_id for seq_id, _ in rows] for rows in lab.backend.rows] == [[1], [1], [1, 2], [1], [1]]


# -- slots ----------------------------------------------------------------------------------------


def test_a_slot_is_free_for_the_next_step_when_the_last_token_is_launched() -> None:
    limits = replace(LIMITS, max_batch=1)
    lab = OverlapLab(limits=limits, eos_one_in=NEVER)
    lab.run(request(1, 2), request(2, 2))
    assert [[seq_id for seq_id, _ in rows] for rows in lab.backend.rows] == [[1], [1], [2], [2]]
    log = lab.backend.log
    assert log.index(("launch", 1)) < log.index(("release", 1)) < log.index(("result", 0))
    assert [lab.answer(seq_id).reason for seq_id in (1, 2)] == ["length", "length"]


def test_a_sequence_with_its_last_token_launched_still_counts_as_running() -> None:
    lab = OverlapLab(eos_one_in=NEVER)
    lab.run(request(1, 3), request(2, 1))
    gauges = [(report.num_running, len(report.prefilling_seq_ids)) for _, report in lab.reports]
    assert gauges == [(1, 0), (1, 0), (0, 0)]
    assert lab.scheduler.kv_used_tokens == 0


@pytest.mark.parametrize("variant", ["static", "dynamic"])
def test_the_next_batch_is_launched_with_the_last_tokens_of_the_one_before(variant: str) -> None:
    lab = OverlapLab(variant, eos_one_in=NEVER)
    pair = [sequence(1, 1), sequence(2, 3)]
    pair[1].group_id = 1
    other = sequence(3, 1)
    lab.run((0.0, Submit(pair)), (0.0, Drain()), (0.05, Submit([other])))
    assert lab.backend.rows == [
        [(1, False), (2, False)],
        [(1, True), (2, False)],
        [(1, True), (2, False)],
        [(3, False)],
    ]
    log = lab.backend.log
    assert log.index(("launch", 3)) < log.index(("result", 2))


# -- rows in vain ---------------------------------------------------------------------------------


def stopping_lab(variant: str = "continuous") -> tuple[OverlapLab, int]:
    """A lab and a sequence id whose answer ends itself after a few tokens."""
    for seq_id in range(1, 200):
        lab = OverlapLab(variant)
        lab.run(request(seq_id, 50, params=may_stop(50)))
        if lab.answer(seq_id).reason == "stop" and 3 <= len(lab.answer(seq_id).token_ids) <= 8:
            return OverlapLab(variant), seq_id
    raise AssertionError("none stops early")


def test_the_row_behind_an_end_token_is_dropped_and_counted_as_dead() -> None:
    lab, seq_id = stopping_lab()
    lab.run(request(seq_id, 50, params=may_stop(50)))
    answer = lab.answer(seq_id)
    num_tokens = len(answer.token_ids)
    assert (answer.reason, answer.token_ids.index(EOS)) == ("stop", num_tokens - 1)
    assert lab.backend.num_launched == num_tokens + 1
    assert [(r.num_rows, r.num_dead_rows) for r in lab.records] == [(1, 0)] * num_tokens + [(0, 1)]
    assert sum(r.num_decode_tokens for r in lab.records) == num_tokens - 1
    timings = lab.updates(seq_id)[-1][1].timings
    assert timings is not None
    assert (timings.num_steps, timings.mean_batch_size) == (num_tokens, 1.0)


def test_the_row_behind_an_end_token_is_no_company_to_others() -> None:
    lab, seq_id = stopping_lab()
    lab.run(request(seq_id, 50, params=may_stop(50)), request(999, 50))
    timings = lab.updates(999)[-1][1].timings
    assert timings is not None
    num_together = len(lab.answer(seq_id).token_ids)
    assert timings.mean_batch_size == (num_together + 50) / 50


def test_in_a_padded_batch_the_dropped_row_goes_on_as_a_dead_one() -> None:
    lab, seq_id = stopping_lab("static")
    pair = [sequence(seq_id, 50, params=may_stop(50)), sequence(999, 20)]
    pair[1].group_id = seq_id
    lab.run((0.0, Submit(pair)))
    num_tokens = len(lab.answer(seq_id).token_ids)
    assert lab.backend.rows[num_tokens] == [(seq_id, False), (999, False)]
    assert lab.backend.rows[num_tokens + 1] == [(seq_id, True), (999, False)]
    assert [r.num_dead_rows for r in lab.records] == [0] * num_tokens + [1] * (20 - num_tokens)
    assert len(lab.answer(999).token_ids) == 20


def test_a_cancel_is_heard_at_once_and_the_launched_row_dropped() -> None:
    lab = OverlapLab(eos_one_in=NEVER)
    lab.run(request(1, 50), request(2, 6), (0.15, Cancel([1])))
    at_s, last = lab.updates(1)[-1]
    # Tokens of the steps that were done at 0.1 and 0.2; the step that is launched by then gives none.
    assert (at_s, last.token_ids, last.finish_reason) == (0.2, [], "abort")
    assert len(lab.answer(1).token_ids) == 2
    assert [(r.num_rows, r.num_dead_rows) for r in lab.records] == [(2, 0), (2, 0), (1, 1)] + [(1, 0)] * 3
    log = lab.backend.log
    assert log.index(("launch", 2)) < log.index(("release", 1)) < log.index(("result", 2))


@pytest.mark.parametrize("variant", ["continuous", "static"])
def test_a_cancel_is_heard_though_the_last_token_is_launched(variant: str) -> None:
    lab = OverlapLab(variant, eos_one_in=NEVER)
    pair = [sequence(1, 2), sequence(2, 4)]
    pair[1].group_id = 1
    lab.run((0.0, Submit(pair)), (0.05, Cancel([1])))
    answer = lab.answer(1)
    assert (len(answer.token_ids), answer.reason) == (1, "abort")
    assert len(lab.answer(2).token_ids) == 4
    assert lab.backend.num_slots_in_use == 0


def test_a_prompt_cancelled_in_the_middle_counts_its_tokens_but_no_row() -> None:
    lab = OverlapLab(limits=replace(LIMITS, max_step_tokens=12))
    lab.run(request(1, 5, prompt=40), (0.05, Cancel([1])))
    assert [(r.num_rows, r.num_dead_rows, r.num_prompt_tokens) for r in lab.records] == [
        (1, 0, 8),
        (0, 1, 8),
    ]
    assert lab.answer(1).token_ids == []


# -- penalties ------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["continuous", "static"])
def test_penalties_wait_for_their_tokens_and_only_then(variant: str) -> None:
    lab = OverlapLab(variant, eos_one_in=NEVER)
    pair = [sequence(1, 3, params=may_stop(3, penalty=1.2)), sequence(2, 5)]
    pair[1].group_id = 1
    lab.run((0.0, Submit(pair)))
    order = calls(lab, "launch", "result")
    assert order[:4] == [("launch", 0), ("result", 0), ("launch", 1), ("result", 1)]
    # The third is the last one with penalties: what follows needs none of its tokens.
    assert order[4:] == [
        ("launch", 2),
        ("launch", 3),
        ("result", 2),
        ("launch", 4),
        ("result", 3),
        ("result", 4),
    ]


def test_prompts_with_penalties_do_not_hold_anybody_up_before_their_first_token() -> None:
    lab = OverlapLab(limits=replace(LIMITS, max_step_tokens=12))
    lab.run(request(1, 1, prompt=24, params=may_stop(1, penalty=1.2)))
    assert calls(lab, "launch", "result")[:2] == [("launch", 0), ("launch", 1)]


# -- failures -------------------------------------------------------------------------------------


def test_a_step_that_does_not_start_ends_its_sequences_after_the_tokens_of_the_one_before() -> None:
    lab = OverlapLab(eos_one_in=NEVER)
    lab.backend.fails_in_launch = {2}
    lab.run(request(1, 5), request(2, 2), request(3, 4, at_s=0.35))
    assert (len(lab.answer(1).token_ids), lab.answer(1).reason) == (2, "error")
    assert lab.updates(1)[-1][1].error == "the backend failed: it would not start"
    assert (len(lab.answer(2).token_ids), lab.answer(2).reason) == (2, "length")
    assert (len(lab.answer(3).token_ids), lab.answer(3).reason) == (4, "length")
    assert lab.backend.rows[3] == [(3, False)], "nothing follows a step that never was"
    assert [record.step for record in lab.records] == list(range(lab.backend.num_launched))


def test_a_step_that_does_not_start_spares_who_ended_in_the_one_before() -> None:
    lab, seq_id = stopping_lab()
    alone = OverlapLab()
    alone.run(request(seq_id, 50, params=may_stop(50)))
    lab.backend.fails_in_launch = {len(alone.answer(seq_id).token_ids)}
    lab.run(request(seq_id, 50, params=may_stop(50)))
    assert lab.answer(seq_id) == alone.answer(seq_id)


def test_a_failed_result_takes_with_it_what_was_computed_on_top_and_nothing_else() -> None:
    lab = OverlapLab(eos_one_in=NEVER)
    lab.backend.fails_in_result = {1}
    # 2 gets its last token in the step that fails, 3 joins in the one that is launched by then.
    lab.run(request(1, 5), request(2, 2), request(3, 4, at_s=0.05))
    assert [(len(lab.answer(n).token_ids), lab.answer(n).reason) for n in (1, 2, 3)] == [
        (1, "error"),
        (1, "error"),
        (4, "length"),
    ]
    assert lab.backend.rows[2] == [(1, False), (3, False)]
    assert [(r.num_rows, r.num_dead_rows) for r in lab.records][1:3] == [(2, 0), (1, 1)]
    assert lab.updates(1)[-1][1].error == "the backend failed: numbers ran out"


def test_a_failed_result_empties_a_padded_batch() -> None:
    lab = OverlapLab("static", eos_one_in=NEVER)
    lab.backend.fails_in_result = {1}
    pair = [sequence(1, 1), sequence(2, 5)]
    pair[1].group_id = 1
    lab.run((0.0, Submit(pair)), request(3, 2, at_s=0.15))
    assert [lab.answer(seq_id).reason for seq_id in (1, 2, 3)] == ["length", "error", "length"]
    assert lab.backend.num_slots_in_use == 0


def test_two_failures_in_a_row_end_both_steps() -> None:
    lab = OverlapLab(eos_one_in=NEVER)
    lab.backend.fails_in_result = {1, 2}
    lab.run(request(1, 5), request(3, 4, at_s=0.05))
    assert [(len(lab.answer(n).token_ids), lab.answer(n).reason) for n in (1, 3)] == [
        (1, "error"),
        (0, "error"),
    ]


def test_any_other_exception_leaves_the_loop() -> None:
    lab = OverlapLab()

    def break_down() -> None:
        raise ZeroDivisionError("a bug")

    lab.backend.on_launch = break_down
    with pytest.raises(ZeroDivisionError):
        lab.run(request(1, 5))


# -- the end --------------------------------------------------------------------------------------


def test_stop_publishes_what_is_launched_and_launches_no_more() -> None:
    lab = OverlapLab(eos_one_in=NEVER)
    lab.run(request(1, 50), (0.15, Stop()))
    assert calls(lab, "launch", "result")[-2:] == [("result", 1), ("result", 2)]
    assert len(lab.answer(1).token_ids) == 3
    assert lab.answer(1).reason is None


def test_drain_ends_the_wait_for_company() -> None:
    lab = OverlapLab("dynamic")
    lab.run(request(1, 1), (0.02, Drain()))
    assert lab.records[0].start_s == pytest.approx(50.02)
    assert lab.answer(1).reason == "length"
