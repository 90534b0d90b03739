"""Percentiles that know their limits."""

from __future__ import annotations

import pytest

from harness.results.stats import mean_of, percentile


@pytest.mark.parametrize(("q", "least"), [(50, 1), (95, 60), (99, 300)])
def test_a_percentile_needs_its_samples(q: int, least: int) -> None:
    assert percentile([1.0] * (least - 1), q).value is None
    assert percentile([1.0] * (least - 1), q).text() == f"n<{least}"
    assert percentile([1.0] * least, q).value == 1.0


def test_percentiles_are_linear_between_neighbours() -> None:
    assert percentile([0.0, 1.0, 2.0, 3.0], 50).value == 1.5
    assert percentile(range(101), 95).value == 95.0


def test_missing_values_are_no_samples() -> None:
    result = percentile([1.0, float("nan"), 3.0], 50)
    assert (result.value, result.num_samples) == (2.0, 2)


def test_weights_are_counts() -> None:
    assert percentile([1.0, 10.0], 50, weights=[1, 3]).value == 10.0
    assert percentile([1.0], 95, weights=[60]).num_samples == 60


def test_mean_of_nothing_is_nothing() -> None:
    assert mean_of([]) is None
    assert mean_of([float("nan")]) is None
    assert mean_of([1.0, 2.0, float("nan")]) == 1.5
