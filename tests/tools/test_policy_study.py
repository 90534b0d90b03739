"""The figures of docs/policies.md, from rows whose answer is known."""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd
import pytest

from tools.policy_study import layout_figures, measured, order_figures, table

ROWS = pd.DataFrame(
    {
        "scheduled_s": [0.0, 1.0, 4.0],
        # The first one waits until both later ones have their first token.
        "chunk_s": [[6.0, 6.1], [2.0, 2.3], [5.0, 5.2]],
    }
)


def test_the_longest_overtaking_is_by_arrival() -> None:
    mean, median, _, overtaking = order_figures(ROWS)
    assert (mean, median, overtaking) == (pytest.approx(8 / 3), 1.0, 4.0)


def test_latencies_of_a_layout_are_in_milliseconds() -> None:
    ttft_p50, _, gap_p99, tpot_p50 = layout_figures(ROWS)
    assert (ttft_p50, tpot_p50) == (pytest.approx(1000.0), pytest.approx(200.0))
    assert 290 < gap_p99 <= 300


def test_a_measured_comparison_gives_the_same_table() -> None:
    path = Path("docs/measured/policies-order.parquet")
    arms, values = measured(path, order_figures)
    assert arms[0] == "continuous"
    assert values.shape == (4, 6, 4)
    text = table("order fcfs", ["a", "b", "c", "d"], arms, values, num_ratios=3)
    assert "| hrrn " in text
    assert all(
        line in Path("docs/policies.md").read_text() for line in re.findall(r"0\.\d\d \(\S+ \S+\)", text)
    )
