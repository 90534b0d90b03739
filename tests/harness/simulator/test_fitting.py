"""A fit finds the cost model that a log was made with, and says how far off it is where it never looked."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from adapters.base import ConfigError
from harness.simulator.costs import FittedCost, Since, StepWork
from harness.simulator.fitting import fit_cost, line, works_of

TRUE = FittedCost((1, 8, 16), (0.004, 0.006, 0.012), 0.001, 2e-5, 1e-4, 4e-8, 2e-9)


def made_steps(num: int, *, spikes: float = 0.0) -> pd.DataFrame:
    draw = np.random.default_rng(3)
    rows = draw.integers(1, 17, num)
    chunks = draw.integers(0, 3, num)
    prompt = chunks * draw.integers(5, 60, num)
    contexts, prompt_contexts = rows * draw.integers(10, 900, num), prompt * draw.integers(5, 300, num)
    works = zip(rows, prompt, chunks, contexts, prompt_contexts, strict=True)
    took = np.array([TRUE.step_s(StepWork(*map(int, work))) for work in works])
    took *= np.where(draw.random(num) < spikes, 5.0, 1.0)
    return pd.DataFrame(
        {
            "num_decode_tokens": rows, "num_dead_rows": 0,
            "num_prompt_tokens": prompt, "num_prompt_chunks": chunks,
            "decode_context_tokens": contexts, "prompt_context_tokens": prompt_contexts,
            "start_s": np.r_[0.0, np.cumsum(took)[:-1]], "duration_s": took,
        }
    )  # fmt: skip


@pytest.mark.parametrize("spikes", [0.0, 0.05])
def test_it_finds_the_model_whatever_interrupted_a_few_steps(spikes: float) -> None:
    cost, quality, ranges = fit_cost(made_steps(1500, spikes=spikes))
    for work in (StepWork(8, 0, 0, 2000, 0), StepWork(16, 60, 2, 9000, 9000), StepWork(1, 20, 1, 50, 400)):
        assert cost.step_s(work) == pytest.approx(TRUE.step_s(work), rel=0.01)
    assert quality.median_error < 0.01
    assert ranges["rows"] == (1.0, 16.0)


def test_it_finds_that_steps_behind_a_prompt_and_an_idle_time_are_slow() -> None:
    steps = made_steps(3000)
    is_decode = np.arange(len(steps)) % 12 > 0
    counts = ["num_prompt_tokens", "num_prompt_chunks", "prompt_context_tokens"]
    steps.loc[is_decode, counts] = 0
    true = replace(TRUE, cold_at_rows=(0.003, 0.002, 0.0), idle_s=0.004, cooling_steps=4.0)
    works = [StepWork(*map(int, work)) for work in works_of(steps).to_numpy()]
    since, starts, at_s = Since(), list[float](), 0.0
    for number, work in enumerate(works):
        is_after_idle = number % 36 == 0
        at_s += 0.1 * is_after_idle
        since = since.step(work, is_after_idle=is_after_idle)
        starts.append(at_s)
        at_s += true.step_s(work, since)
    steps["start_s"], steps["duration_s"] = starts, np.diff([*starts, at_s])
    steps["duration_s"] -= 0.1 * (np.arange(1, len(steps) + 1) % 36 == 0)
    cost, quality, _ = fit_cost(steps)
    assert cost.cooling_steps == 4
    assert quality.median_error < 0.01
    for since in (Since(1), Since(2, 2), Since(5, 5), Since(6, 40)):
        work = StepWork(2, 0, 0, 500, 0)
        assert cost.step_s(work, since) == pytest.approx(true.step_s(work, since), rel=0.02)
    assert fit_cost(made_steps(1500))[0].cooling_steps == 0


def test_a_short_log_is_refused() -> None:
    with pytest.raises(ConfigError, match="99 steps are too few"):
        fit_cost(made_steps(99))


def test_a_line_survives_outliers_and_is_never_negative() -> None:
    x = np.repeat(np.arange(1.0, 9.0), 20)
    y = 0.001 + 0.0002 * x
    y[::7] += 0.5
    assert line(x, y) == pytest.approx((0.001, 0.0002), rel=0.05)
    assert line(x, -x) == (0.0, 0.0)
