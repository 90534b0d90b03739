"""Percentiles that know their limits, and paired ratios."""

from __future__ import annotations

import math

import pytest

from harness.stats import mean_of, paired_ratio, percentile


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


def test_paired_ratio_is_taken_block_by_block() -> None:
    # The machine got twice as slow in the third block; the ratio does not notice.
    ratio = paired_ratio([20.0, 22.0, 10.0], [10.0, 10.0, 5.0])
    assert (ratio.median, ratio.low, ratio.high) == (2.0, 2.0, pytest.approx(2.2))
    assert ratio.text() == "2.00x [2.00-2.20]"


def test_interval_is_that_of_student_on_logarithms() -> None:
    ratio = paired_ratio([1.0, 2.0, 4.0], [1.0, 1.0, 1.0])
    # Logarithms 0, ln 2, 2 ln 2: mean ln 2, standard deviation ln 2; t(0.975, 2) = 4.303.
    half_width = 4.303 * math.log(2) / math.sqrt(3)
    assert ratio.interval is not None
    assert ratio.interval[0] == pytest.approx(2 / math.exp(half_width))
    assert ratio.interval[1] == pytest.approx(2 * math.exp(half_width))


def test_one_block_has_no_interval() -> None:
    ratio = paired_ratio([3.0], [2.0])
    assert (ratio.interval, ratio.text(), ratio.interval_text()) == (None, "1.50x", "1 block")


@pytest.mark.parametrize(("values", "references"), [([], []), ([1.0], [1.0, 2.0]), ([0.0], [1.0])])
def test_ratios_that_cannot_be_are_refused(values: list[float], references: list[float]) -> None:
    with pytest.raises(ValueError, match="paired ratios need"):
        paired_ratio(values, references)
