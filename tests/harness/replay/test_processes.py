"""A process of a replay hands over what it has, whenever it is told to stop."""

from __future__ import annotations

import multiprocessing

from harness.client.connection import Origin
from harness.client.target import Target
from harness.plan.corpus import Prompt
from harness.plan.schedule import Arrivals, Load, make_schedule
from harness.replay.processes import _READY, WorkerPlan, _run_worker
from harness.replay.runner import ReplayEnd


def test_told_to_stop_before_its_start() -> None:
    schedule = make_schedule([Prompt(id="p", prompt="x", max_tokens=1)], 5, Load(Arrivals.CLOSED, 2), seed=1)
    target = Target(Origin("127.0.0.1", 9), "/generate")
    plan = WorkerPlan(target, schedule, 1, 8, 5.0, index=0, num_workers=1)
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_run_worker, args=(theirs, plan), daemon=True)
    process.start()
    theirs.close()
    assert ours.recv() == _READY
    process.terminate()
    ours.send(0.0)
    end = ours.recv()
    assert isinstance(end, ReplayEnd)
    assert end.was_interrupted
    process.join(10)
    assert process.exitcode == 0
