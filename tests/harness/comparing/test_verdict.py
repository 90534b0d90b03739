"""Verdicts over blocks: intervals, words, and the number of blocks that is still missing."""

from __future__ import annotations

import math

import numpy as np
import pytest

from harness.comparing.verdict import judge_ratio, log_interval, t_quantile
from harness.selfcheck.simulated_trials import Noise, many_trials


@pytest.mark.parametrize(
    ("probability", "degrees", "expected"),
    [(0.975, 1, 12.706), (0.975, 2, 4.303), (0.975, 30, 2.042), (0.99375, 2, 8.860), (0.9, 5, 1.476)],
)
def test_quantiles_of_student(probability: float, degrees: int, expected: float) -> None:
    assert t_quantile(probability, degrees) == pytest.approx(expected, abs=1e-3)


def test_interval_of_few_blocks_is_students_on_logarithms() -> None:
    found = judge_ratio([0.0, math.log(2), 2 * math.log(2)], higher_is_better=True)
    # Mean ln 2, standard deviation ln 2; t(0.975, 2) = 4.303.
    half_width = 4.3027 * math.log(2) / math.sqrt(3)
    assert found.ratio == pytest.approx(2)
    assert found.interval == pytest.approx((2 / math.exp(half_width), 2 * math.exp(half_width)), rel=1e-3)
    assert found.word == "can't tell"


def test_interval_of_many_blocks_is_a_bootstrap_that_knows_skew() -> None:
    logs = np.array([0.0] * 15 + [0.01] * 4 + [0.3])
    low, high = log_interval(logs, 0.95)
    middle = float(logs.mean())
    assert low < middle < high
    assert high - middle > 1.5 * (middle - low)
    assert log_interval(logs, 0.95) == (low, high)


@pytest.mark.parametrize(
    ("logs", "higher_is_better", "word"),
    [
        ([0.70, 0.71, 0.69], True, "better"),
        ([0.70, 0.71, 0.69], False, "worse"),
        ([-0.70, -0.71, -0.69], False, "better"),
        ([0.001, -0.001, 0.0], True, "equivalent"),
        ([0.010, 0.011, 0.009], True, "equivalent"),
        ([0.5, -0.5, 0.1], True, "can't tell"),
    ],
)
def test_words(logs: list[float], higher_is_better: bool, word: str) -> None:
    found = judge_ratio(logs, higher_is_better=higher_is_better)
    assert found.word == word
    assert (found.num_missing > 0) == (word == "can't tell")


def test_more_metrics_make_wider_intervals() -> None:
    logs = [0.10, 0.14, 0.12]
    assert judge_ratio(logs, higher_is_better=True).word == "better"
    assert judge_ratio(logs, higher_is_better=True, error_share=0.1).word == "can't tell"


def test_one_block_tells_nothing() -> None:
    found = judge_ratio([0.4], higher_is_better=True)
    assert (found.word, found.interval, found.num_missing) == ("can't tell", None, 2)
    with pytest.raises(ValueError, match="at least one block"):
        judge_ratio([], higher_is_better=True)


def test_blocks_asked_for_grow_with_the_noise() -> None:
    quiet = judge_ratio([0.02, -0.02, 0.05], higher_is_better=True)
    loud = judge_ratio([0.2, -0.2, 0.5], higher_is_better=True)
    assert 0 < quiet.num_missing < loud.num_missing


def test_nothing_is_found_where_nothing_is() -> None:
    outcome = many_trials(120, 0.0, Noise(run=0.01))
    assert outcome.ever_different <= 0.07 + 3 * math.sqrt(0.07 * 0.93 / 120)
    assert outcome.equivalent > 0.85


def test_a_slowdown_is_found_with_the_blocks_that_were_asked_for() -> None:
    outcome = many_trials(60, 0.05, Noise(run=0.005))
    assert outcome.decided_different >= 0.90
