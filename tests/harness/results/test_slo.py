"""One grammar for limits: on each request, on a percentile, on the run."""

from __future__ import annotations

import argparse

import pytest

from adapters.base import ConfigError
from harness.results.metrics import METRICS, Figure
from harness.results.slo import Slo, goodput, parse_limits
from tests.harness.made_rows import made_frame, made_row


def slo(text: str) -> Slo:
    return Slo(tuple(parse_limits(text)))


def test_goodput_counts_requests_that_meet_all_limits() -> None:
    rows = made_frame(
        [
            made_row(0, chunk_s=(0.1, 0.2)),
            made_row(1, chunk_s=(0.1, 0.9)),
            made_row(2, chunk_s=(0.6, 0.7)),
            made_row(3, chunk_s=(0.1,), chunk_tokens=(1,)),
            made_row(4, error="http 500"),
        ]
    )
    good = goodput(rows, slo("ttft_ms=500, tpot_ms=200"), window_s=2.0)
    # Only 0 and 3 do: 1 is slow between tokens, 2 at its first one, 4 failed; 3 has no TPOT to miss.
    assert good.requests_per_s == pytest.approx(1.0)
    assert good.share == pytest.approx(2 / 5)


def test_times_are_from_schedule_unless_the_name_says_send() -> None:
    rows = made_frame([made_row(0, scheduled_s=0.0, sent_s=0.4, chunk_s=(0.5, 0.9))])
    for text, is_met in (
        ("ttft_ms=450", False), ("ttft_sched_ms=450", False), ("ttft_send_ms=450", True),
        ("ttft_p50_ms=450", False), ("ttft_send_p50_ms=450", True),
        ("total_ms=800", False), ("total_send_ms=800", True),
    ):  # fmt: skip
        assert slo(text).are_met(rows, is_open=False) is is_met, text


def test_a_limit_on_gaps_holds_for_the_longest_of_a_request() -> None:
    rows = made_frame(
        [made_row(0, chunk_s=(0.1, 0.2, 0.3), chunk_tokens=(1, 1, 1)), made_row(1, chunk_s=(0.1, 0.4))]
    )
    assert goodput(rows, slo("itl_ms=150"), window_s=1.0).share == pytest.approx(1 / 2)
    assert slo("itl_p50_ms=150").are_met(rows, is_open=False)


def test_a_metric_of_the_run_has_its_limit_on_its_better_side() -> None:
    rows = made_frame([made_row(0, chunk_s=(0.5, 1.0))])
    assert slo("output_tokens_per_s=2,requests_per_s=1").are_met(rows, is_open=False)
    assert not slo("output_tokens_per_s=2.1").are_met(rows, is_open=False)
    assert slo("request_time_ms=1000").are_met(rows, is_open=False)
    assert not slo("request_time_ms=999").are_met(rows, is_open=False)


def test_limits_are_on_percentiles_and_failures_meet_none() -> None:
    rows = made_frame([made_row(i, chunk_s=(0.1 + i / 1000, 2.0)) for i in range(100)])
    assert slo("ttft_p95_ms=195,total_p50_ms=2000").are_met(rows, is_open=False)
    assert not slo("ttft_p95_ms=190").are_met(rows, is_open=False)
    failed = made_frame([made_row(0), made_row(1, error="http 500")])
    assert not slo("ttft_p50_ms=1e9").are_met(failed, is_open=False)
    with pytest.raises(ConfigError, match="needs 300 answers"):
        slo("total_p99_ms=5").are_met(rows, is_open=False)


@pytest.mark.parametrize(
    "text", ["speed=3", "ttft_ms=0", "ttft_ms=fast", "ttft_ms", "ttft_p95_ms=0", "ttft_p9_ms=1"]
)
def test_limits_that_mean_nothing_are_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=r"is no metric; use|must be a number above 0"):
        parse_limits(text)


def test_every_metric_of_the_table_can_be_limited() -> None:
    for metric in METRICS:
        (limit,) = parse_limits(f"{Figure(metric).key}=5")
        assert limit.figure == Figure(metric)
        assert limit.text() == f"{Figure(metric).key}=5"
