"""The figures of docs/policies.md, from rows whose answer is known."""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd
import pytest

from harness.plan.corpus import load_corpus
from tools.policy_study import (
    MUCH,
    class_figures,
    client_figures,
    layout_figures,
    measured,
    named,
    order_figures,
    table,
    with_clients_and_classes,
)

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


def test_clients_and_classes_are_told_apart(tmp_path: Path) -> None:
    rows = ROWS.assign(user=["little-7", MUCH, "little-8"], priority=[0, 2, 1])
    assert client_figures(rows) == pytest.approx([3.5, 5.95, 1.0])
    # Waits of 6, 1 and 1 s, due after 10, 0.5 and 2 s.
    assert class_figures(rows)[3] == pytest.approx(200 / 3)
    corpus = load_corpus(with_clients_and_classes(tmp_path))
    share = sum(prompt.user == MUCH for prompt in corpus.prompts) / len(corpus.prompts)
    assert 0.55 < share < 0.65
    assert {prompt.priority for prompt in corpus.prompts} == {0, 1, 2}


def test_a_measured_comparison_gives_the_same_table() -> None:
    path = Path("docs/measured/policies-order.parquet")
    arms, values = measured(path, order_figures)
    assert arms[0] == "continuous"
    assert values.shape == (4, 6, 4)
    text = table("order", ["a", "b", "c", "d"], named(arms, "fcfs"), values)
    assert "| hrrn " in text
    assert all(
        line in Path("docs/policies.md").read_text() for line in re.findall(r"0\.\d\d \(\S+ \S+\)", text)
    )
