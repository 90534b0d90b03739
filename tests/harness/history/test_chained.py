"""The chain of ratios: what a machine does from night to night is not in it."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from harness.history.change_points import jumps
from harness.history.page import make_parts
from harness.history.series import chained, marks
from harness.history.store import History
from harness.history.trials import ratio_rates
from harness.results.formulas import Floats
from tests.harness.history.made_history import FIRST_NIGHT, held, sha


def test_a_chain_goes_from_commit_to_commit() -> None:
    lines = [
        held(0, "a" * 12, "b" * 12, 1.1),
        held(1, "b" * 12, "c" * 12, 0.5),
        held(2, "b" * 12, "d" * 12, 0.9),  # c did not pass
        held(3, "9" * 12, "e" * 12, 2.0),  # one that the history no longer knows
        held(4, "e" * 12, "f" * 12, 7.0, validity="INVALID"),
        held(5, "x" * 12, "f" * 12, 7.0, against="static"),  # another strategy, no commit
    ]
    chain = chained(pd.DataFrame(lines))
    assert list(chain["value"]) == pytest.approx([1.1, 0.55, 0.99, 1.98])
    assert chain["low"].iloc[1] == pytest.approx(1.1 * 0.5 * 0.99)


def slower_at(night: int, num: int, drift: Floats) -> pd.DataFrame:
    """Each night is held against the one before; the machine drifts, and the code is 5% slower at `night`."""
    noise = np.random.default_rng(3).normal(size=num) * 0.006
    lines: list[dict[str, object]] = []
    for n in range(num):
        ratio = float(np.exp(noise[n]) * (0.95 if n == night else 1))
        lines.append(held(n, sha(n), sha(n + 1), ratio))
        level = 1000 * float(np.exp(drift[n])) * (0.95 if n >= night else 1)
        lines.append(held(n, "", sha(n + 1), level, kind="result", against=None, machine="one"))
    return pd.DataFrame(lines)


def test_a_step_is_marked_at_its_night_where_the_machine_drifts_by_more() -> None:
    drift = np.random.default_rng(4).normal(size=40) * 0.06
    rows = slower_at(25, 40, drift)
    (mark,) = [mark for mark in marks(rows) if mark.of_ratios]
    assert (mark.commit, mark.at) == (sha(26), FIRST_NIGHT + pd.Timedelta(days=25))
    assert mark.ratio == pytest.approx(0.95, rel=0.02)
    (part,) = make_parts(History(rows, ()))
    chain, _ = part.trends
    assert "chained" in chain.title
    assert len(chain.spec["layer"]) == 5


def test_noise_has_no_jumps_and_a_short_chain_none_at_all() -> None:
    noise = np.random.default_rng(0).normal(size=60) * 0.01
    assert jumps(np.exp(np.concatenate(([0.0], np.cumsum(noise))))) == []
    assert jumps(np.array([1.0, 1.0, 0.5])) == []
    assert jumps(np.ones(60)) == []
    rates = ratio_rates(200, 60, 0.05, 0.0075)
    assert rates.false_alarm <= 0.05
    assert rates.exact > 0.95
