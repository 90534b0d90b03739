"""What the harness reports, held against a server that knows its own delays. Bounds are generous: no figure
of a shared machine is asserted here, only that nothing is missing, shifted or hidden."""

from __future__ import annotations

import numpy as np
import pytest

from harness.replay.floor import measure_floor, measure_known
from harness.replay.known_server import Delays
from harness.selfcheck.known_truth import STALL_S, distances, stall_shown, within_bound


@pytest.mark.parametrize("is_random", [False, True])
def test_reported_percentiles_are_what_the_server_did(is_random: bool) -> None:
    delays = Delays(ttft_s=0.03, gap_s=0.01, is_random=is_random)
    measured = measure_known(delays, 100.0, 100, 6)
    assert len(measured.rows) == 100
    found = distances(measured)
    assert {(name, q) for name, q, _, _ in found} >= {("TTFT", 50), ("TTFT", 95), ("ITL", 99), ("total", 95)}
    for name, q, told_ms, true_ms in found:
        if q == 50:
            assert abs(told_ms - true_ms) < 5, (name, told_ms, true_ms)
    # No stamp is earlier than the server's own.
    for stamps, sent in zip(measured.rows["chunk_s"], measured.token_s, strict=True):
        assert len(stamps) <= len(sent)
        assert stamps[-1] >= sent[-1] - 1e-6
        assert np.all(np.diff(stamps) >= 0)


def test_a_stall_is_felt_in_full() -> None:
    longest_ms, felt = stall_shown(rate=30.0, num_requests=150)
    assert longest_ms >= STALL_S * 1e3
    assert felt >= 0.98


def test_the_bound() -> None:
    assert within_bound(50.9, 50.0)
    assert not within_bound(51.5, 50.0)
    assert within_bound(102.0, 100.0)


def test_the_floor_is_measured_once_and_small() -> None:
    floor = measure_floor()
    assert floor is measure_floor()
    assert floor.ttft_p50_ms is not None
    assert 0 < floor.ttft_p50_ms < 50
