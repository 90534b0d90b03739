"""The fewest replicas that meet limits, for each arm and router, on simulated traffic.

More replicas are taken to be no worse, so that the number is found by doubling and halving. A request is at
risk where its own time is above any of the limits, whatever percentile they are on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from harness.plan.schedule import Schedule
from harness.results.metrics import Figure
from harness.results.slo import Limit, Slo
from harness.simulator.brief import BriefRows
from harness.simulator.calibration import Calibration
from harness.simulator.fleet_spec import FleetOptions
from harness.simulator.simulation import simulate
from services.settings import Settings


@dataclass(frozen=True, slots=True)
class Probe:
    """One simulated number of replicas."""

    num_replicas: int
    meets: bool
    at_risk: float
    """Share of all requests, those that failed included."""
    values: dict[str, float | None]
    """Of each limit's figure, by its key."""


@dataclass(slots=True)
class Candidate:
    """One arm behind one router; `probes` by number of replicas."""

    arm: str
    router: str
    probes: dict[int, Probe] = field(default_factory=dict)
    most: dict[str, int] = field(default_factory=dict)

    @property
    def fewest(self) -> Probe | None:
        return min((p for p in self.probes.values() if p.meets), key=lambda p: p.num_replicas, default=None)


def search(candidate: Candidate, try_out: Callable[[int], Probe], most_replicas: int) -> None:
    """Fills `probes`; none of them meets the limits where `most_replicas` do not."""

    def meets(number: int) -> bool:
        candidate.probes[number] = probe = try_out(number)
        return probe.meets

    low, high = 0, 1
    while not meets(high):
        if high == most_replicas:
            return
        low, high = high, min(2 * high, most_replicas)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if meets(middle) else (middle, high)


def probe(
    candidate: Candidate,
    settings: Settings,
    calibration: Calibration,
    schedule: Schedule,
    options: FleetOptions,
    slo: Slo,
    num_replicas: int,
) -> Probe:
    """
    Raises:
        ConfigError: the schedule is too short for a percentile of the limits.
    """
    kept = BriefRows(len(schedule.requests))
    made = simulate(
        settings, calibration, schedule, replace(options, num_replicas=num_replicas), on_end=kept.add
    )
    for name, value in made.most.items():
        candidate.most[name] = max(value, candidate.most.get(name, 0))
    rows, is_open = kept.frame(), schedule.load.is_open
    on_each = Slo(tuple(Limit(Figure(limit.figure.metric), limit.bound) for limit in slo.limits))
    values_of = {limit.figure.key: limit.figure.value(rows, is_open) for limit in slo.on_the_run}
    at_risk = float(1 - on_each.meeting(rows).mean())
    return Probe(num_replicas, slo.are_met(rows, is_open=is_open), at_risk, values_of)
