"""Percentiles that know their limits."""

from __future__ import annotations

import math

import numpy as np
import pytest

from harness.results.formulas import Samples
from harness.results.stats import RANK_ERROR, mean_of, percentile, rank_interval


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


@pytest.mark.parametrize(("num", "q"), [(5, 50), (64, 50), (60, 95), (400, 95), (300, 99), (1000, 99)])
def test_ranks_enclose_the_percentile_as_often_as_said(num: int, q: int) -> None:
    """Held against the binomial in whole numbers."""
    ranks = rank_interval(num, q)
    assert ranks is not None
    below = [math.comb(num, k) * (q / 100) ** k * (1 - q / 100) ** (num - k) for k in range(num + 1)]
    # One rank further in, either end would be wrong too often.
    assert sum(below[: ranks[0]]) <= RANK_ERROR < sum(below[: ranks[0] + 1])
    assert sum(below[ranks[1] :]) <= RANK_ERROR < sum(below[ranks[1] - 1 :])


@pytest.mark.parametrize(("q", "least"), [(95, 60), (99, 300)])
def test_fewer_requests_than_a_percentile_needs_have_no_upper_end(q: int, least: int) -> None:
    assert rank_interval(least, q) is not None
    assert rank_interval(least - 2, q) is None


def test_many_tokens_of_few_answers_have_no_p99() -> None:
    three = Samples(np.ones(600), np.repeat(np.arange(3), 200), np.ones(600))
    assert three.percentile(99).value is None
    assert three.percentile(99).text() == "n<300"


def test_intervals_of_percentiles() -> None:
    found = percentile(range(1, 101), 95)
    assert found.interval == (91.0, 99.0)
    assert found.text() == "95.0 [91.0-99.0]"
    assert percentile([1.0, 2.0], 50).interval is None


def test_mean_of_nothing_is_nothing() -> None:
    assert mean_of([]) is None
    assert mean_of([float("nan")]) is None
    assert mean_of([1.0, 2.0, float("nan")]) == 1.5
