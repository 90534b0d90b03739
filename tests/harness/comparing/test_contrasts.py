"""Contrasts: the same request under two arms, block by block."""

from __future__ import annotations

import pytest

from harness.comparing.contrasts import contrasts, decision, in_words, more_blocks
from harness.results.record import Row
from tests.harness.comparing.test_comparison import run_rows
from tests.harness.made_rows import made_frame


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
        "output tok/s", "time per request", "TTFT p50", "TTFT p95", "total p95",
    ]  # fmt: skip
    for contrast in found:
        assert contrast.verdict is not None
        assert contrast.verdict.word == "better"
        assert contrast.verdict.ratio == pytest.approx(
            2.0 if contrast.figure.metric.higher_is_better else 0.5
        )
    assert in_words(found, "other").startswith("better in output tok/s (2.00x), time per request (0.50x)")
    assert more_blocks(found, is_open=False) == 0


def test_a_client_that_waits_before_it_sends_gains_nothing() -> None:
    rows = blocks((1.0, 1.0), (1.0, 1.0))
    for row in rows:
        if row["arm"] == "other":
            row["sent_s"] += 0.4
            row["ttft_ms"] -= 400
            row["total_ms"] -= 400
    found = contrasts(made_frame(rows), ["baseline", "other"], "baseline", is_open=False)
    latencies = [c for c in found if not c.figure.metric.higher_is_better]
    assert len(latencies) == 4
    for contrast in latencies:
        assert contrast.verdict is not None
        assert contrast.verdict.ratio == pytest.approx(1.0)


def test_only_requests_that_both_answered_count() -> None:
    rows = blocks((1.0, 1.0), (1.0, 1.0))
    for row in rows:
        if row["arm"] == "other" and row["schedule_index"] >= 30:
            row["error"] = "http 500"
    found = contrasts(made_frame(rows), ["baseline", "other"], "baseline", is_open=False)
    deciding = decision(found, "other", is_open=True)
    assert deciding is not None
    assert deciding.verdict is not None
    assert deciding.verdict.ratio == pytest.approx(1.0)
    # Thirty pairs are too few for a p95.
    assert [c.verdict for c in found if c.figure.label == "TTFT p95"] == [None]
    assert "too few samples for TTFT p95" in in_words(found, "other")


def test_too_few_blocks_ask_for_more() -> None:
    found = contrasts(made_frame(blocks((1.0, 1.2))), ["baseline", "other"], "baseline", is_open=False)
    assert more_blocks(found, is_open=False) == 2
    assert "can't tell in output tok/s (need 2 more blocks)" in in_words(found, "other")
