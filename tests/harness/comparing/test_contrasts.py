"""Contrasts: the same request under two arms, block by block."""

from __future__ import annotations

from typing import Any

import pytest

from harness.comparing.contrasts import Blocks, Design, contrasts, design_of, most_asking
from harness.comparing.trade import in_words
from harness.results.metrics import Figure, deciding_figures
from harness.results.record import Row
from tests.harness.comparing.test_comparison import run_rows
from tests.harness.made_rows import made_frame, made_manifest


def blocks(*seconds: tuple[float, float], num: int = 60) -> list[Row]:
    rows: list[Row] = []
    for block, (theirs_s, ours_s) in enumerate(seconds):
        rows += run_rows("baseline", block, theirs_s, num=num) + run_rows("other", block, ours_s, num=num)
    return rows


def test_a_machine_that_drifts_does_not_move_the_ratio() -> None:
    found = contrasts(
        made_frame(blocks((1.0, 0.5), (2.0, 1.0), (4.0, 2.0))),
        ["baseline", "other"],
        "baseline",
        is_open=False,
    )
    assert [c.figure.label for c in found] == [
        "output tok/s", "total geomean", "TTFT p50", "TTFT p95", "TPOT p50", "TPOT p95", "total p95",
        "ITL p99", "longest stall p95",
    ]  # fmt: skip
    # Three blocks of 60 requests are fewer than a p99 needs.
    assert [c.figure.label for c in found if c.verdict is None] == ["ITL p99"]
    for contrast in (c for c in found if c.verdict):
        assert contrast.verdict is not None
        assert contrast.verdict.word == "better"
        assert contrast.verdict.ratio == pytest.approx(
            2.0 if contrast.figure.metric.higher_is_better else 0.5
        )
    assert in_words(found, "other").startswith("better in output tok/s (2.00x), total geomean (0.50x)")
    assert most_asking(found, is_open=False) is None


def test_a_client_that_waits_before_it_sends_gains_nothing() -> None:
    rows = blocks((1.0, 1.0), (1.0, 1.0))
    for row in rows:
        if row["arm"] == "other":
            row["sent_s"] += 0.4
            row["ttft_ms"] -= 400
            row["total_ms"] -= 400
    found = contrasts(made_frame(rows), ["baseline", "other"], "baseline", is_open=False)
    latencies = [c for c in found if not c.figure.metric.higher_is_better]
    assert len(latencies) == 8
    for contrast in (c for c in latencies if c.figure.label != "ITL p99"):
        assert contrast.verdict is not None
        assert contrast.verdict.ratio == pytest.approx(1.0)


def test_only_requests_that_both_answered_count() -> None:
    rows = blocks((1.0, 1.0), (1.0, 1.0))
    for row in rows:
        if row["arm"] == "other" and row["schedule_index"] >= 30:
            row["error"] = "http 500"
    found = contrasts(made_frame(rows), ["baseline", "other"], "baseline", is_open=False)
    deciding = found[1]
    assert deciding.verdict is not None
    assert deciding.verdict.ratio == pytest.approx(1.0)
    # Thirty pairs are too few for a p95.
    assert [c.verdict for c in found if c.figure.label == "TTFT p95"] == [None]
    assert "too few samples for TTFT p95" in in_words(found, "other")


def test_too_few_blocks_ask_for_more() -> None:
    found = contrasts(made_frame(blocks((1.0, 1.2))), ["baseline", "other"], "baseline", is_open=False)
    asking = most_asking(found, is_open=False)
    assert asking is not None
    assert asking.num_missing == 2
    assert "can't tell in output tok/s (need at least 2 more blocks)" in in_words(found, "other")


def test_gaps_of_all_blocks_count_together() -> None:
    found = contrasts(made_frame(blocks(*[(1.0, 0.5)] * 5)), ["baseline", "other"], "baseline", is_open=False)
    (itl,) = (c for c in found if c.figure.label == "ITL p99")
    assert itl.word == "better"


def test_a_drift_within_blocks_is_not_taken_for_a_difference() -> None:
    """Every run is 2% slower than the one before it, and `c` stands late in most blocks."""
    orders = ("abc", "bac", "acb", "bca")
    rows: list[Row] = []
    places = {}
    for block, order in enumerate(orders):
        for place, arm in enumerate(order):
            places[arm, block] = place
            rows += run_rows(arm, block, 1.02 ** (3 * block + place))
    frame = made_frame(rows)
    (plain, *_), (ordered, *_) = (
        [c for c in contrasts(frame, list("abc"), "a", is_open=False, design=Design(p)) if c.arm == "c"]
        for p in ({}, places)
    )
    assert plain.verdict is not None
    assert ordered.verdict is not None
    assert plain.verdict.ratio < 0.99
    assert ordered.verdict.ratio == pytest.approx(1.0)
    assert ordered.word == "equivalent"


def test_the_order_of_a_block_is_that_of_the_starts() -> None:
    runs = []
    for started_at, arm, block in (("1", "b", 0), ("0", "a", 0), ("2", "a", 1), ("3", "b", 1)):
        run = made_manifest(run_rows(arm, block, 1.0, num=1), arm=arm, planned_repeats=[block])
        run.started_at = started_at
        runs.append(run)
    assert design_of(runs).places == {("a", 0): 0, ("b", 0): 1, ("a", 1): 0, ("b", 1): 1}
    runs[0].started_at = "0"
    assert design_of(runs).places == {}


@pytest.mark.parametrize(("planned", "first_look"), [((1, 1), 3), ((4, 4), 4), ((4, 6), 4)])
def test_the_first_look_is_after_the_blocks_that_were_planned_first(
    planned: tuple[int, int], first_look: int
) -> None:
    """Runs of a comparison that went on name the larger number, files of single runs name none."""
    runs = [made_manifest(run_rows("a", 0, 1.0, num=1)) for _ in planned]
    for run, num_blocks in zip(runs, planned, strict=True):
        run.schedule.num_blocks = num_blocks
    assert design_of(runs).first_look == first_look


def test_blocks_that_were_planned_say_more_than_blocks_that_were_added() -> None:
    frame = made_frame(blocks((1.0, 1.2), (1.1, 1.3), (1.0, 1.25), (0.9, 1.1)))
    planned, added = (
        contrasts(frame, ["baseline", "other"], "baseline", is_open=False, design=Design(first_look=num))[0]
        for num in (4, 3)
    )
    assert planned.verdict is not None
    assert added.verdict is not None
    assert planned.verdict.ratio == added.verdict.ratio
    assert planned.verdict.confidence < added.verdict.confidence


def test_a_figure_of_a_block_is_worked_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [row for arm in "abc" for block in range(2) for row in run_rows(arm, block, 1.0 + block)]
    frame, worked_out = made_frame(rows), 0
    whole = Figure.value

    def counted(figure: Figure, *given: Any) -> float | None:
        nonlocal worked_out
        worked_out += 1
        return whole(figure, *given)

    expected = [contrasts(frame, list("abc"), reference, is_open=False) for reference in "abc"]
    monkeypatch.setattr(Figure, "value", counted)
    shared = Blocks(frame)
    assert [contrasts(shared, list("abc"), reference, is_open=False) for reference in "abc"] == expected
    assert worked_out == 3 * 2 * len(deciding_figures())
