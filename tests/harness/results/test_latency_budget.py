"""The latency budget adds up request by request, and says where clocks cannot be compared."""

from __future__ import annotations

import pytest

from harness.results.latency_budget import latency_budget
from harness.results.record import Row
from tests.harness.made_rows import made_frame, made_row


def told(index: int = 0, *, server_starts_at_s: float = 0.0, group_id: int = 0, waits_s: float = 0.0) -> Row:
    """Scheduled at 10 - waits_s, sent at 10.1, written 10.3, received 10.4, answered 13.1, there at 13.2."""
    row = made_row(index, scheduled_s=10.0 - waits_s, sent_s=10.1, chunk_s=(13.2, 14.0), group_id=group_id)
    return row | {
        "written_s": 10.3,
        "received_s": 10.4 + server_starts_at_s,
        "first_token_s": 12.95 + server_starts_at_s,
        "first_write_s": 13.1 + server_starts_at_s,
        "queue_s": 0.5,
        "batch_wait_s": 0.25,
        "prefill_s": 1.75,
    }


def test_terms_are_differences_of_their_own_stamps() -> None:
    budget = latency_budget(made_frame([told()]))
    assert budget is not None
    assert budget.shares_clock
    assert budget.terms.iloc[0].to_dict() == pytest.approx(
        {
            "chunk_ms": 0, "lag_ms": 100, "connection_ms": 200, "network_ms": 200, "queue_ms": 500,
            "batch_wait_ms": 250,
            "prefill_ms": 1750, "delivery_ms": 150, "residual_ms": 50, "ttft_sched_ms": 3200,
        }
    )  # fmt: skip
    assert budget.residual_share == pytest.approx(50 / 3200)
    means = budget.means()
    assert sum(means.values()) == pytest.approx(3200)


def test_waiting_for_a_chunk_is_the_clients_own_term() -> None:
    budget = latency_budget(made_frame([told(0, waits_s=4.0), told(1)]))
    assert budget is not None
    assert list(budget.terms["chunk_ms"]) == pytest.approx([4000, 0])
    assert list(budget.terms["lag_ms"]) == pytest.approx([100, 100])


def test_another_machines_clock_is_not_compared() -> None:
    rows = made_frame([told(server_starts_at_s=-9000.0)])
    budget = latency_budget(rows, round_trip_s=0.15)
    assert budget is not None
    assert not budget.shares_clock
    assert budget.terms["network_ms"].iloc[0] == pytest.approx(150)
    assert budget.terms["residual_ms"].iloc[0] == pytest.approx(100)


def test_servers_that_tell_nothing_have_no_budget() -> None:
    assert latency_budget(made_frame([made_row()])) is None
    assert latency_budget(made_frame([told() | {"error": "http 500"}])) is None


def test_a_foreign_servers_means_fill_queue_and_prefill() -> None:
    rows = made_frame([made_row(i, scheduled_s=10.0, sent_s=10.1, chunk_s=(11.0, 12.0)) for i in range(2)])
    rows["written_s"] = 10.3
    budget = latency_budget(rows, 0.02, (0.4, None))
    assert budget is not None
    assert budget.has_server_means
    means = budget.means()
    assert (means["lag_ms"], means["connection_ms"]) == pytest.approx((100, 200))
    assert (means["network_ms"], means["queue_ms"], means["prefill_ms"]) == pytest.approx((20, 400, 0))
    assert means["residual_ms"] == pytest.approx(1000 - 720)
    assert budget.residual_share == pytest.approx(0.28)
    assert latency_budget(rows, 0.02) is None
