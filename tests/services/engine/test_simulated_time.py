"""What a simulator does: engines driven turn by turn on virtual clocks, without threads and real time."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as Seq

import pytest

from services.engine.engine import Engine
from services.engine.messages import Cancel, Drain, Submit
from tests.services.engine.test_engine import EngineLab, request
from tests.services.overlap_lab import OverlapLab
from tests.services.virtual_time import Clock

Script = Seq[tuple[float, Submit | Cancel | Drain]]


def simulate(engine: Engine, clock: Clock, script: Script) -> None:
    """Hand over the messages at their times and take turns until nothing is left to do."""
    coming = deque((clock.now_s + at_s, message) for at_s, message in script)
    while True:
        due = []
        while coming and coming[0][0] <= clock.now_s:
            due.append(coming.popleft()[1])
        engine.handle(due)
        idle_s = engine.step()
        if idle_s == 0:
            continue
        moments = [coming[0][0]] if coming else []
        if idle_s is not None:
            moments.append(clock.now_s + idle_s)
        if not moments:
            return
        clock.now_s = min(moments)


@pytest.mark.parametrize("variant", ["baseline", "static", "dynamic", "continuous"])
@pytest.mark.parametrize("tick_s", [0.0, 0.25])
@pytest.mark.parametrize("lab_of", [EngineLab, OverlapLab], ids=["plain", "overlapping"])
def test_turns_give_the_reports_of_the_loop(
    lab_of: type[EngineLab | OverlapLab], variant: str, tick_s: float
) -> None:
    def script() -> list[tuple[float, Submit | Cancel | Drain]]:
        arrivals = [request(i, 2 + i % 4, prompt=3 + 4 * i, at_s=0.3 * i) for i in range(9)]
        return sorted([*arrivals, (0.95, Cancel([3, 4])), (2.0, Drain())], key=lambda entry: entry[0])

    looped, simulated = lab_of(variant, tick_s=tick_s), lab_of(variant, tick_s=tick_s)
    looped.run(*script())
    simulate(simulated.engine, simulated.clock, script())
    assert simulated.reports == looped.reports
    assert sum(u.finish_reason is not None for _, report in simulated.reports for u in report.updates) == 9


def test_replicas_keep_their_own_time() -> None:
    """A fleet on one virtual time: each arrival goes to the replica that is free first."""
    fleet = [EngineLab("baseline"), EngineLab("baseline")]
    for seq_id, num_tokens in enumerate([5, 1, 1, 1, 2]):
        free_first = min(fleet, key=lambda lab: lab.clock.now_s)
        simulate(free_first.engine, free_first.clock, [request(seq_id, num_tokens)])
    assert [lab.clock.now_s - 50.0 for lab in fleet] == pytest.approx([0.5, 0.5])
    assert [{u.seq_id for _, r in lab.reports for u in r.updates} for lab in fleet] == [{0}, {1, 2, 3, 4}]
