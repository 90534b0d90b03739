"""The grid meets rows, contexts and prompts, and its steps give back the model that made them."""

from __future__ import annotations

import pytest

from adapters.base import BackendConfig, BackendInfo, ConfigError
from harness.simulator.costs import FittedCost, StepWork
from harness.simulator.fitting import fit_cost
from harness.simulator.grid import measure_grid
from harness.simulator.replica import Clock, TimedBackend
from tests.harness.simulator.test_calibration import INFO

TRUE = FittedCost((1, 8, 16), (0.004, 0.006, 0.012), 0.001, 2e-5, 1e-4, 4e-8, 2e-9)


def test_its_steps_give_back_the_model_that_made_them() -> None:
    clock = Clock()
    backend = TimedBackend(BackendInfo(**INFO), TRUE, clock)  # type: ignore[arg-type]
    config = BackendConfig(max_batch_size=16, max_step_tokens=256)

    def pause(seconds: float) -> None:
        clock.now_s += seconds

    steps = measure_grid(backend, config, clock=clock, pause=pause)
    gaps = steps["start_s"].diff() - steps["duration_s"].shift()
    assert (gaps > 0.05).sum() > 10  # idle times
    cost, quality, ranges = fit_cost(steps)
    assert quality.median_error < 0.01
    for work in (StepWork(12, 0, 0, 3000, 0), StepWork(7, 64, 1, 900, 4000), StepWork(0, 128, 3, 0, 20000)):
        assert cost.step_s(work) == pytest.approx(TRUE.step_s(work), rel=0.03)
    assert ranges["rows"] == (0.0, 16.0)
    assert (steps["num_prompt_tokens"] + steps["num_decode_tokens"]).max() <= config.max_step_tokens
    assert steps["num_prompt_chunks"].max() > 1
    assert ((steps["num_prompt_chunks"] > 0) & (steps["num_decode_tokens"] > 0)).any()


def test_no_room_for_a_grid_is_refused() -> None:
    backend = TimedBackend(BackendInfo(**INFO | {"max_model_len": 40}), TRUE, Clock())  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="40 tokens of a sequence are too few for a grid"):
        measure_grid(backend, BackendConfig(max_batch_size=16), pause=lambda seconds: None)
