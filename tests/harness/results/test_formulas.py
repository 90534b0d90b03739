"""Each definition on rows small enough to check by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from harness.results.formulas import request_metrics, send_lag_s, throughput, token_gaps
from tests.harness.made_rows import made_frame, made_row


def test_one_request() -> None:
    # Scheduled at 10, sent at 10.5; a first chunk of 2 tokens at 11, then 1 at 11.5 and 3 at 13.
    metrics = request_metrics(
        scheduled_s=10.0, sent_s=10.5, chunk_s=[11.0, 11.5, 13.0], chunk_tokens=[2, 1, 3], num_output_tokens=6
    )
    assert metrics.ttft_ms == pytest.approx(500)
    assert metrics.ttft_sched_ms == pytest.approx(1000)
    assert metrics.total_ms == pytest.approx(2500)
    assert metrics.total_sched_ms == pytest.approx(3000)
    assert metrics.tokens_per_sec == pytest.approx(5 / 2.0)
    assert metrics.tpot_ms == pytest.approx(2000 / 4)


@pytest.mark.parametrize(
    ("chunk_s", "chunk_tokens", "num", "tokens_per_sec", "tpot_ms"),
    [
        pytest.param([1.0], [1], 1, None, None, id="a single token has no rate"),
        pytest.param([1.0], [5], 5, None, None, id="nor has a single chunk"),
        pytest.param([1.0, 2.0], [1, 1], 2, 1.0, 1000.0, id="two tokens"),
        pytest.param([1.0, 2.0], None, 9, 8.0, 125.0, id="no token ids: the first chunk counts as one"),
    ],
)
def test_rates_of_short_answers(
    chunk_s: list[float], chunk_tokens: list[int] | None, num: int, tokens_per_sec: float, tpot_ms: float
) -> None:
    metrics = request_metrics(
        scheduled_s=0.0, sent_s=0.0, chunk_s=chunk_s, chunk_tokens=chunk_tokens, num_output_tokens=num
    )
    assert (metrics.tokens_per_sec, metrics.tpot_ms) == (tokens_per_sec, tpot_ms)


def test_an_answer_without_tokens_has_no_latencies() -> None:
    metrics = request_metrics(scheduled_s=0.0, sent_s=0.0, chunk_s=[], chunk_tokens=[], num_output_tokens=0)
    assert metrics.ttft_ms is None
    assert metrics.total_ms is None


def test_failed_rows_have_no_metrics_but_keep_their_stamps() -> None:
    row = made_row(error="http 500")
    assert row["chunk_s"] == [1.0, 2.0]
    assert all(row[name] is None for name in ("ttft_ms", "ttft_sched_ms", "total_ms", "tpot_ms"))


def test_closed_loop_throughput_is_everything_from_first_send_to_last_finish() -> None:
    rows = made_frame(
        [
            made_row(0, sent_s=1.0, chunk_s=(2.0, 3.0)),
            made_row(1, sent_s=2.0, chunk_s=(4.0, 6.0), chunk_tokens=(1, 7)),
        ]
    )
    rate = throughput(rows, is_open=False)
    assert rate is not None
    assert rate.window_s == pytest.approx(5.0)
    assert rate.output_tokens_per_s == pytest.approx(10 / 5)
    assert rate.requests_per_s == pytest.approx(2 / 5)


def test_open_loop_throughput_counts_what_was_stamped_inside_the_window() -> None:
    # The schedule starts at 100 and its last arrival is at 104: tokens after that do not count.
    rows = made_frame(
        [
            made_row(0, scheduled_s=101.0, offset_s=1.0, chunk_s=(102.0, 103.0), chunk_tokens=(1, 2)),
            made_row(1, scheduled_s=104.0, offset_s=4.0, chunk_s=(104.0, 110.0), chunk_tokens=(1, 5)),
        ]
    )
    rate = throughput(rows, is_open=True)
    assert rate is not None
    assert rate.window_s == pytest.approx(4.0)
    assert rate.output_tokens_per_s == pytest.approx(4 / 4)
    assert rate.requests_per_s == pytest.approx(1 / 4)


def test_open_loop_without_token_ids_spreads_the_count_over_chunks() -> None:
    rows = made_frame(
        [
            made_row(
                0, scheduled_s=0.0, offset_s=0.0, chunk_s=(1.0, 3.0), chunk_tokens=None, num_output_tokens=8
            ),
            made_row(1, scheduled_s=2.0, offset_s=2.0, chunk_s=(9.0,), chunk_tokens=(1,)),
        ]
    )
    rate = throughput(rows, is_open=True)
    assert rate is not None
    assert rate.output_tokens_per_s == pytest.approx(4 / 2)


def test_no_throughput_where_everything_failed() -> None:
    assert throughput(made_frame([made_row(error="x")]), is_open=False) is None


def test_gaps_are_shared_by_the_tokens_of_their_chunk() -> None:
    rows = made_frame([made_row(0, chunk_s=(1.0, 2.0, 5.0), chunk_tokens=(4, 1, 3)), made_row(1, error="x")])
    gaps = token_gaps(rows)
    assert gaps.is_per_token
    np.testing.assert_allclose(gaps.values, [1000, 1000])
    assert gaps.weights is not None
    np.testing.assert_allclose(gaps.weights, [1, 3])


def test_without_token_ids_gaps_are_between_chunks() -> None:
    gaps = token_gaps(made_frame([made_row(0, chunk_tokens=None, num_output_tokens=9)]))
    assert not gaps.is_per_token
    np.testing.assert_allclose(gaps.values, [1000])


def test_send_lag_of_a_chunk_counts_from_its_last_prompt() -> None:
    rows = made_frame(
        [
            made_row(0, scheduled_s=1.0, sent_s=3.1, group_id=0),
            made_row(1, scheduled_s=3.0, sent_s=3.1, group_id=0),
            made_row(2, scheduled_s=4.0, sent_s=4.5, group_id=1),
            made_row(3, scheduled_s=5.0, sent_s=None, error="not sent", group_id=-1),
        ]
    )
    np.testing.assert_allclose(sorted(send_lag_s(rows)), [0.1, 0.5])


def test_missing_numbers_become_nan_in_the_frame() -> None:
    frame = made_frame([made_row(0, chunk_s=(1.0,), chunk_tokens=(1,))])
    assert math.isnan(frame["tpot_ms"].iloc[0])
