"""Change points: marked where a step was planted, and not where there is noise alone."""

from __future__ import annotations

import numpy as np
import pytest

from harness.history.change_points import FALSE_ALARM, MIN_NIGHTS, change_points
from harness.history.trials import trial_rates, trials_text


def noisy(num: int, seed: int, noise: float = 0.01) -> np.ndarray:
    return np.exp(noise * np.random.default_rng(seed).normal(size=num))


@pytest.mark.parametrize("night", [2 * MIN_NIGHTS, 30, 60 - 2 * MIN_NIGHTS])
def test_a_step_is_marked_at_its_night(night: int) -> None:
    values = noisy(60, seed=1)
    values[night:] *= 0.95
    (mark,) = change_points(values)
    assert abs(mark.index - night) <= 1
    assert mark.ratio == pytest.approx(0.95, abs=0.015)


def test_two_steps_are_two_marks() -> None:
    values = noisy(60, seed=2)
    values[20:] *= 1.08
    values[40:] *= 0.93
    assert [mark.index for mark in change_points(values)] == pytest.approx([20, 40], abs=1)


def test_one_wild_night_is_no_change() -> None:
    values = noisy(60, seed=3)
    values[30] *= 0.2
    assert change_points(values) == []


def test_equal_values_and_short_series_have_no_change() -> None:
    assert change_points(np.ones(60)) == []
    assert change_points(np.array([1.0] * 3 + [2.0] * 4)) == []


def test_rates_over_simulated_histories() -> None:
    """As `lab history trials` prints them, over fewer histories."""
    rates = trial_rates(60, 60, step=0.05, noise=0.01, memory=0.0)
    # 60 histories at a rate of 5% have more than 8 alarms once in 300 times.
    assert rates.false_alarm <= 8 / 60
    assert rates.found >= 0.95
    assert trial_rates(60, 60, step=0.05, noise=0.01, memory=0.3).false_alarm <= 0.25


def test_a_stricter_bound_has_fewer_alarms() -> None:
    alarms = [
        sum(bool(change_points(noisy(30, seed), false_alarm=level)) for seed in range(100))
        for level in (0.5, FALSE_ALARM)
    ]
    assert alarms[0] > 15 > alarms[1]


def test_the_table_names_its_histories() -> None:
    text = trials_text(2, 30, 0.05)
    assert text.startswith("2 histories of 30 nights, a step of 5% planted in each")
    assert "pure noise marked" in text
