"""The time around steps is found again in the rows and steps that it went into."""

from __future__ import annotations

from dataclasses import asdict, replace

import pandas as pd
import pytest

from harness.plan.planner import plan
from harness.settings import HarnessSettings
from harness.simulator.calibration import null_calibration
from harness.simulator.costs import NullCost
from harness.simulator.fleet_spec import FleetOptions
from harness.simulator.measured import fit_overheads
from harness.simulator.overheads import Overheads
from harness.simulator.simulation import read_arm, simulate

TRUE = Overheads(0.0003, 1e-5, 0.001, 0.0012, 0.0007, 5e-5)


def found(load: dict[str, float], true: Overheads = TRUE) -> Overheads:
    """By a fit to a simulated run of 100 requests."""
    calibration = null_calibration().model_copy(
        update={"cost": NullCost(0.02, 0.001, 0.0001), "overheads": true}
    )
    _, schedule = plan(HarnessSettings(requests=100, **load), allow_changed_corpus=False)  # type: ignore[arg-type]
    made = simulate(read_arm("continuous", {}, calibration), calibration, schedule, FleetOptions())
    rows = [
        {"sent_s": f.sent_s, "received_s": f.seq.arrival_s, "chunk_s": f.chunk_s}
        | {name: getattr(f.timings, name) for name in ("queue_s", "batch_wait_s")}
        for f in made.flights
    ]
    steps = pd.DataFrame([asdict(step) for step in made.steps]).assign(repeat=0)
    return fit_overheads(pd.DataFrame(rows), steps, 16)


@pytest.mark.parametrize(
    "load", [{"rate": 1.0}, {"concurrency": 8, "ramp_s": 10.0}, {"concurrency": 8}, {"concurrency": 30}]
)
def test_requests_that_find_an_idle_engine_tell_how_long_the_api_takes(load: dict[str, float]) -> None:
    """In a closed loop that is the first one alone."""
    assert asdict(found(load)) == pytest.approx(asdict(TRUE), rel=0.05)


def test_a_log_shows_whether_steps_were_launched_ahead() -> None:
    true = replace(TRUE, gap_fixed_s=0.0, gap_row_s=0.0, overlaps=True)
    assert asdict(found({"rate": 1.0}, true)) == pytest.approx(asdict(true), rel=0.05, abs=1e-6)
