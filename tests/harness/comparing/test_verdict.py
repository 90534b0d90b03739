"""Verdicts over blocks: intervals, words, and the number of blocks that is still missing."""

from __future__ import annotations

import math

import numpy as np
import pytest

from harness.comparing.intervals import (
    ERROR_OF_EARLY_LOOK,
    MAX_MORE_BLOCKS,
    blocks_missing,
    error_of_look,
    log_interval,
    t_quantile,
    without_order,
)
from harness.comparing.verdict import judge_ratio
from harness.selfcheck.simulated_trials import Noise, go_on_as_asked, look_once


@pytest.mark.parametrize(
    ("probability", "degrees", "expected"),
    [(0.975, 1, 12.706), (0.975, 2, 4.303), (0.975, 30, 2.042), (0.99375, 2, 8.860), (0.9, 5, 1.476)],
)
def test_quantiles_of_student(probability: float, degrees: int, expected: float) -> None:
    assert t_quantile(probability, degrees) == pytest.approx(expected, abs=1e-3)


def test_interval_of_few_blocks_is_students_on_logarithms() -> None:
    found = judge_ratio([0.0, math.log(2), 2 * math.log(2)], higher_is_better=True)
    # Mean ln 2, standard deviation ln 2; the first look may err in 0.4 x 5%: t(0.99, 2) = 6.965.
    half_width = 6.9646 * math.log(2) / math.sqrt(3)
    assert found.ratio == pytest.approx(2)
    assert found.interval == pytest.approx((2 / math.exp(half_width), 2 * math.exp(half_width)), rel=1e-3)
    assert found.word == "can't tell"


def test_one_disturbed_block_of_many_moves_nothing() -> None:
    logs = np.array([0.010, 0.012, 0.008, 0.011, 0.009, 0.010, 0.012, 0.3])
    low, high = log_interval(logs, 0.95)
    assert low < 0.0105 < high
    assert high < 0.02
    assert log_interval(logs[3:], 0.95)[1] < 0.05
    # Four blocks are too few to leave any out.
    assert log_interval(logs[4:], 0.95)[1] > 0.1


def test_intervals_of_many_comparisons_are_those_of_each() -> None:
    logs = np.random.default_rng(0).normal(size=(5, 12))
    together = np.array(log_interval(logs, 0.99)).T
    assert together == pytest.approx(np.array([log_interval(own, 0.99) for own in logs]))


def test_a_disturbed_run_does_not_make_a_drift() -> None:
    places = np.array([[0, 1, 2, 0, 1, 2], [1, 2, 0, 2, 0, 1], [2, 0, 1, 1, 2, 0]])
    noise = np.random.default_rng(0).normal(0, 0.001, places.shape)
    runs = 0.02 * places + noise
    quiet = without_order(runs - runs[0], places, 0).logs
    runs[2, 0] += 0.5
    struck = without_order(runs - runs[0], places, 0).logs
    assert np.abs(quiet).max() < 0.01
    assert np.abs(np.delete(struck, 0, axis=1)).max() < 0.05


@pytest.mark.parametrize("first_look", [3, 4, 8])
def test_all_looks_together_spend_the_allowed_error(first_look: int) -> None:
    """A false alarm at any look up to 40 blocks, simulated for one metric that may err in 5%."""
    logs = np.random.default_rng(0).normal(size=(2000, 40))
    ever = np.zeros(len(logs), dtype=bool)
    for num_blocks in range(first_look, 41):
        low, high = log_interval(logs[:, :num_blocks], 1 - 0.05 * error_of_look(num_blocks, first_look))
        ever |= (low > 0) | (high < 0)
    assert ever.mean() < 0.05


def test_the_first_look_may_err_most() -> None:
    assert [error_of_look(num, 4) for num in (3, 4, 5, 6)] == [0.40, *ERROR_OF_EARLY_LOOK]
    assert error_of_look(7, 4) == error_of_look(30, 4) < ERROR_OF_EARLY_LOOK[-1]


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
    missing = [blocks_missing(error, 8, math.log(1.05), 0.99) for error in (0.008, 0.012, 0.02, 3.0)]
    assert missing == sorted(set(missing))
    assert missing[-1] == MAX_MORE_BLOCKS + 1


def test_blocks_asked_for_are_a_plan() -> None:
    few = judge_ratio([3.0, -3.0, 0.1], higher_is_better=True)
    assert few.text() == "can't tell: need at least 6 more blocks"
    many = judge_ratio([3.0, -3.0] * 5, higher_is_better=True)
    assert many.num_missing == MAX_MORE_BLOCKS + 1
    assert many.text().startswith("can't tell: the difference, if any, is below ")
    near = judge_ratio([0.3, -0.3, 0.02, 0.25, -0.22] * 2, higher_is_better=True, margin=0.01)
    assert near.missing_text().endswith(near.bound_text())
    assert near.interval is not None
    assert near.bound_text() == f"{max(1 / near.interval[0], near.interval[1]) - 1:.0%}"


@pytest.mark.parametrize("num_arms", [2, 6])
def test_a_comparison_of_equal_arms_finds_nothing(num_arms: int) -> None:
    noise = Noise(num_arms=num_arms)
    assert look_once(300, 3, 0.0, noise, seed=2).any_differs <= 0.05
    found = look_once(300, 10, 0.0, noise, seed=2)
    assert found.any_differs <= 0.05
    assert found.coverage > 0.93


@pytest.mark.parametrize("num_arms", [2, 6])
def test_intervals_cover_as_often_as_they_say_from_five_blocks_on(num_arms: int) -> None:
    """With one disturbed run among them, which would make intervals of untrimmed means cover always."""
    found = look_once(600, 5, 0.0, Noise(num_arms=num_arms), seed=5)
    assert 0.925 < found.coverage < 0.975


@pytest.mark.parametrize("first_look", [3, 4])
def test_a_slowdown_is_found_with_the_blocks_that_were_asked_for(first_look: int) -> None:
    noise = Noise(run=0.005, metric=0.003)
    assert min(go_on_as_asked(100, first_look, 0.05, noise, 30, seed=2).found) >= 0.90
    assert go_on_as_asked(100, first_look, 0.0, noise, 30, seed=2).ever_differs <= 0.05


def test_an_interval_without_an_end_is_said_in_words() -> None:
    far = judge_ratio([0.5, -0.4], higher_is_better=True, error_share=0.01)
    assert far.interval_text() == "too few blocks"
