"""A run is VALID until something says otherwise; each rule is shown to fire, and to be quiet."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from harness.plan.schedule import Arrivals, Load
from harness.results.manifest import RunManifest, Validity
from harness.results.record import Row
from harness.results.validity import judge
from tests.harness.made_rows import made_frame, made_manifest, made_repeat, made_row

NUM = 60
OPEN = Load(Arrivals.CONSTANT, rate=5.0)


def closed_rows(num: int = NUM, **changes: Any) -> list[Row]:
    """One user, one answer a second."""
    return [made_row(i, scheduled_s=i, sent_s=i, chunk_s=(i + 0.5, i + 1.0), **changes) for i in range(num)]


def open_rows(lag_s: float = 0.001, stretch: float = 1.0, num: int = NUM) -> list[Row]:
    return [
        made_row(
            i,
            scheduled_s=i / 5,
            offset_s=i / 5,
            sent_s=i / 5 * stretch + lag_s,
            chunk_s=(i / 5 + 0.5, i / 5 + 1.0),
        )
        for i in range(num)
    ]


def judged(rows: list[Row], manifest: RunManifest | None = None, **changes: Any) -> Validity:
    return judge(made_frame(rows), manifest or made_manifest(rows, **changes))


def test_a_quiet_run_is_valid() -> None:
    assert judged(closed_rows()) == Validity()
    assert judged(closed_rows()).level == "VALID"
    assert judged(open_rows(), load=OPEN) == Validity()


def test_invalid_outranks_caution_and_both_are_told() -> None:
    verdict = Validity(("broken",), ("noisy",))
    assert verdict.level == "INVALID"
    assert verdict.lines() == ["INVALID", "  INVALID: broken", "  caution: noisy"]


def failed_requests() -> Validity:
    rows = closed_rows()
    rows[3] = made_row(3, scheduled_s=3.0, sent_s=3.0, error="http 500: broken")
    return judged(rows)


def corpus_changed() -> Validity:
    rows = closed_rows()
    corpus = {"sha256": "a" * 64, "recorded_sha256": "b" * 64, "num_prompts": 500}
    return judged(rows, made_manifest(rows, corpus=corpus))


def schedule_changed() -> Validity:
    rows = closed_rows()
    manifest = made_manifest(rows)
    rows[5]["prompt_id"] = "another"
    return judged(rows, manifest)


def rows_missing() -> Validity:
    rows = closed_rows()
    return judged(rows[:-2], made_manifest(rows))


def nothing_finished() -> Validity:
    return judged([], made_manifest(closed_rows(), entries=[]))


def repeat_missing() -> Validity:
    rows = closed_rows()
    return judged(rows, made_manifest(rows, repeats=2, entries=[made_repeat(0)]))


def with_repeat(**changes: Any) -> Validity:
    rows = closed_rows()
    return judged(rows, made_manifest(rows, entries=[made_repeat(0, **changes)]))


def model_changed() -> Validity:
    rows = closed_rows() + closed_rows(repeat=1)
    repeats = [made_repeat(0), made_repeat(1, model_digest="other")]
    return judged(rows, made_manifest(rows, repeats=2, entries=repeats))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (failed_requests, "1 of 60 requests failed; 1x: http 500: broken"),
        (corpus_changed, "the corpus is not the recorded one"),
        (schedule_changed, "not the schedule that was planned"),
        (rows_missing, "2 of 60 requests were never finished"),
        (nothing_finished, "no request was finished"),
        (repeat_missing, "1 of 2 repeats ran to their end"),
        (model_changed, "the model changed between repeats"),
        (lambda: with_repeat(was_interrupted=True), "the run was interrupted"),
        (lambda: with_repeat(hit_in_flight_cap=True), "too many requests were in flight"),
        (lambda: with_repeat(service_problem="the service ended early"), "the service ended early"),
        # The bound is a tenth of the mean gap of 0.2 s: 20 ms.
        (lambda: judged(open_rows(lag_s=0.025), load=OPEN), "p99 send lag 25.0 ms, allowed are 20 ms"),
        (lambda: judged(open_rows(stretch=1.1), load=OPEN), "91% of the rate"),
    ],
)
def test_what_makes_a_run_invalid(make: Callable[[], Validity], reason: str) -> None:
    verdict = make()
    assert verdict.level == "INVALID"
    assert any(reason in sentence for sentence in verdict.invalid), verdict


def test_many_requests_are_long_enough_on_a_fast_machine() -> None:
    rows = closed_rows(300)
    for row in rows:
        for name in ("scheduled_s", "sent_s", "finish_s"):
            row[name] /= 60
        row["chunk_s"] = [stamp / 60 for stamp in row["chunk_s"]]
    assert judged(rows, load=Load(Arrivals.CLOSED, concurrency=12)).level == "VALID"
    few_rounds = judged(rows, load=Load(Arrivals.CLOSED, concurrency=13))
    assert few_rounds.caution == ("short run: 5.0 s measured, less than 10 s",)


def test_the_blocks_of_a_comparison_count_together() -> None:
    """9 answers of 9 s: too short and too few alone and in three blocks, enough in seven."""

    def doubts(num_blocks: int) -> tuple[str, ...]:
        rows = closed_rows(9)
        manifest = made_manifest(rows)
        manifest.schedule.num_blocks = num_blocks
        return judge(made_frame(rows), manifest).caution

    short, few = doubts(1)[::-1]
    assert (short, few) == (
        "short run: 9.0 s measured, less than 10 s",
        "few samples: 9 answers, p95 needs 60",
    )
    assert doubts(3) == ("few samples: 9 answers in each of 3 blocks, p95 needs 60",)
    assert doubts(7) == ()


def test_small_lag_and_a_slightly_stretched_load_are_allowed() -> None:
    assert judged(open_rows(lag_s=0.019), load=OPEN).level == "VALID"


def with_machine(**changes: Any) -> Validity:
    return with_repeat(machine=changes)


def with_host(num_threads: int = 1, **changes: Any) -> Validity:
    rows = closed_rows()
    return judged(rows, made_manifest(rows, host=changes, service={"num_threads": num_threads}))


RECORDED = {"sha256": "a", "recorded_sha256": "a", "num_prompts": 500}


def changed(**changes: Any) -> Validity:
    rows = closed_rows()
    return judged(rows, made_manifest(rows, **changes))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: judged(closed_rows(59)), "few samples: 59 answers"),
        (lambda: judged(closed_rows(9)), "short run: 9.0 s"),
        (
            lambda: judged(closed_rows(), load=Load(Arrivals.CLOSED, concurrency=31)),
            "60 requests for 31 users",
        ),
        (lambda: with_host(physical_cores=1), "share the only core"),
        (lambda: changed(settings={"processes": 2}), "2 processes of the harness beside 1 engine threads"),
        (lambda: with_machine(steal_share=0.02), "withheld 2.0% of the CPU time"),
        (lambda: with_machine(throttled_share=0.05), "a CPU quota held processes back for 5.0%"),
        (lambda: with_machine(other_cpu_share=0.3), "other processes took 30%"),
        (lambda: with_machine(harness_cpu_share=0.9), "the harness used 90% of a core"),
        (lambda: with_host(cpu_governor="powersave"), "CPU governor powersave"),
        (lambda: with_host(num_threads=2), "set N_THREADS to at most 1"),
        (lambda: judged(closed_rows(max_tokens=9)), "60 of 60 answers ended before their budget"),
        (
            lambda: judged(closed_rows(chunk_tokens=None, num_output_tokens=4)),
            "the server sends no token ids",
        ),
        (
            lambda: judged(closed_rows(chunk_tokens=None, num_output_tokens=1)),
            "60 answers came in more pieces of text than the server counted tokens",
        ),
        (
            lambda: changed(corpus=RECORDED | {"left_out": "9 of 10 rows of the trace were left out"}),
            "9 of 10 rows of the trace were left out: the load is not the trace's",
        ),
        (lambda: judged(closed_rows(num_output_tokens=3)), "60 answers streamed another number of tokens"),
        (
            lambda: changed(corpus={"sha256": "a", "recorded_sha256": None, "num_prompts": 500}),
            "the corpus has no recorded digest",
        ),
        (
            lambda: changed(corpus=RECORDED | {"num_prompts": 59}, service={"scheduling": "engine"}),
            "prompts were sent more than once",
        ),
        (
            lambda: changed(corpus=RECORDED | {"num_prompts": 59}, service=None),
            "prompts were sent more than once",
        ),
        (
            lambda: changed(service={"device": "cpu", "details": {"cpu_kernels": False}}),
            "without its CPU kernels",
        ),
        (
            lambda: with_repeat(steps={"mean_batch_size": 1, "dead_row_share": 0, "num_dropped": 7}),
            "the step log lost 7 steps",
        ),
    ],
)
def test_what_calls_for_caution(make: Callable[[], Validity], reason: str) -> None:
    verdict = make()
    assert verdict.level == "CAUTION"
    assert any(reason in sentence for sentence in verdict.caution), verdict


@pytest.mark.parametrize(
    ("settings", "is_told"),
    [({"url": "http://localhost:1"}, True), ({"processes": 2}, True), ({}, False)],
)
def test_client_and_server_that_fill_the_machine_are_told(settings: dict[str, Any], is_told: bool) -> None:
    rows = closed_rows()
    busy = made_repeat(machine={"busy_share": 0.97, "harness_total_cpu_share": 1.25})
    manifest = made_manifest(rows, entries=[busy], settings=settings, schedule={"salt": None})
    told = " ".join(judged(rows, manifest).caution)
    assert ("97% of the machine's CPU time were in use, 1.2 cores by the harness" in told) is is_told


def test_as_many_pieces_as_tokens_hold_one_each() -> None:
    assert judged(closed_rows(chunk_tokens=None, num_output_tokens=2)).level == "VALID"


def test_a_corpus_may_be_replayed_again_where_nothing_caches() -> None:
    assert changed(corpus=RECORDED | {"num_prompts": 59}).level == "VALID"


@pytest.mark.parametrize(("is_asked_for", "level"), [(False, "CAUTION"), (True, "VALID")])
def test_hits_that_were_asked_for_are_measured_and_others_told(is_asked_for: bool, level: str) -> None:
    rows = [row | {"num_cached_tokens": 3} for row in closed_rows()]
    strategy = {"max_batch": 4, "prefix_cache": is_asked_for}
    assert judged(rows, made_manifest(rows, service={"strategy": strategy})).level == level


def test_repeats_against_one_running_server_call_for_caution() -> None:
    rows = closed_rows() + closed_rows(repeat=1)
    manifest = made_manifest(rows, repeats=2, settings={"url": "http://h", "seed": 0})
    assert "prefix cache" in judged(rows, manifest).caution[0]


@pytest.mark.parametrize("details", [{}, {"cpu_kernels": True}])
def test_kernels_that_run_and_backends_that_have_none_are_fine(details: dict[str, bool]) -> None:
    assert changed(service={"device": "cpu", "details": details}).level == "VALID"


def test_a_machine_far_away_is_not_judged_by_ours() -> None:
    rows = closed_rows()
    manifest = made_manifest(rows, is_local=False, host={"cpu_governor": "powersave"})
    assert judged(rows, manifest).level == "VALID"


@pytest.mark.parametrize("governor", ["performance", None])
def test_a_fixed_or_unknown_governor_is_fine(governor: str | None) -> None:
    assert with_host(cpu_governor=governor).level == "VALID"


def test_a_floor_that_is_much_of_the_latency_is_told() -> None:
    rows = [made_row(i, sent_s=i, scheduled_s=i, chunk_s=(i + 0.01, i + 1.0)) for i in range(60)]
    frame = made_frame(rows)
    for floor_ms, is_told in ((0.5, False), (2.0, True)):
        floor = {"ttft_p50_ms": floor_ms, "ttft_p95_ms": None, "send_lag_p99_ms": 0.1, "num_requests": 100}
        told = " ".join(judge(frame, made_manifest(rows, floor=floor)).caution)
        assert ("the harness's own floor is 2.0 ms of a median TTFT of 10.0 ms" in told) is is_told
