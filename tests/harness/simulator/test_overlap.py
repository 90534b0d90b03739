"""One step ahead: the time between steps is hidden, and who comes in the middle of a step joins one later."""

from __future__ import annotations

import pytest

from harness.plan.arrival_times import Arrivals, Load
from harness.plan.schedule import PlannedRequest, Schedule
from harness.simulator.calibration import null_calibration
from harness.simulator.costs import NullCost
from harness.simulator.fleet_spec import FleetOptions
from harness.simulator.overheads import Overheads
from harness.simulator.simulation import Simulated, read_arm, simulate

STEP_S, GAP_S = 0.02, 0.005


def played(*requests: tuple[float, int], overlaps: bool) -> Simulated:
    """`requests`: when each comes, and its tokens."""
    cost, around = NullCost(STEP_S, 0.0, 0.0), Overheads(gap_fixed_s=GAP_S, overlaps=overlaps)
    calibration = null_calibration().model_copy(update={"cost": cost, "overheads": around})
    planned = tuple(
        PlannedRequest(i, f"p{i}", (1, 2, 3), tokens, 0, offset_s=at_s)
        for i, (at_s, tokens) in enumerate(requests)
    )
    schedule = Schedule(Load(Arrivals.POISSON, rate=1.0), planned, {}, "")
    return simulate(read_arm("continuous", {}, calibration), calibration, schedule, FleetOptions())


@pytest.mark.parametrize(("overlaps", "step_s"), [(False, STEP_S + GAP_S), (True, STEP_S)])
def test_the_gap_is_hidden_behind_the_step(overlaps: bool, step_s: float) -> None:
    made = played((0.0, 10), overlaps=overlaps)
    assert made.flights[0].chunk_s == pytest.approx([STEP_S + i * step_s for i in range(10)])
    assert len(made.steps) == 10


@pytest.mark.parametrize(("overlaps", "first_s"), [(False, 2 * STEP_S + GAP_S), (True, 3 * STEP_S)])
def test_who_comes_in_the_middle_of_a_step_waits_for_the_one_that_is_launched(
    overlaps: bool, first_s: float
) -> None:
    made = played((0.0, 50), (0.01, 2), overlaps=overlaps)
    second = next(flight for flight in made.flights if flight.planned.index == 1)
    assert second.chunk_s[0] == pytest.approx(first_s)
    assert [len(flight.chunk_s) for flight in sorted(made.flights, key=lambda f: f.planned.index)] == [50, 2]


def test_messages_are_seen_between_steps_alone() -> None:
    """One comes while the last step of the other is waited for, one when nothing runs any more."""
    made = played((0.0, 2), (0.03, 1), (1.0, 1), overlaps=True)
    firsts = {flight.planned.index: flight.chunk_s[0] for flight in made.flights}
    assert firsts[1] == pytest.approx(3 * STEP_S)
    assert firsts[2] == pytest.approx(1.0 + STEP_S)
