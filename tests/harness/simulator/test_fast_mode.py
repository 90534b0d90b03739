"""The fast mode takes runs of equal steps as one event and gives every request what the exact mode gives."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence as Seq
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from adapters.base import Sequence
from harness.plan.corpus import Prompt
from harness.plan.load import make_load
from harness.plan.schedule import Schedule, make_schedule
from harness.simulator.calibration import Calibration
from harness.simulator.costs import AnyCost, FittedCost, NullCost, RooflineCost
from harness.simulator.fleet_spec import FleetOptions
from harness.simulator.operations import Autoscaling, Failures
from harness.simulator.overheads import Overheads
from harness.simulator.routers import ROUTERS
from harness.simulator.simulation import Simulated, read_arm, simulate
from harness.simulator.step_log import StepRecords
from services.admissions import ADMISSIONS
from services.contract.timings import SequenceTimings
from services.kv_policies import KV_POLICIES
from services.layouts import LAYOUTS
from services.orders import ORDERS
from services.strategies import VARIANTS
from services.strategies.base import Admission
from services.strategies.continuous import Continuous

COSTS: tuple[AnyCost, ...] = (
    NullCost(0.004, 0.0005, 0.00001),
    NullCost(0.0, 0.0, 0.0),
    FittedCost((1, 4), (0.003, 0.004), 0.0003, 1e-5, 2e-5, 3e-8, 1e-9),
    FittedCost((0, 1, 4), (0.001, 0.003, 0.004), 0.0, 1e-5, 0.0, 3e-8, 0.0, (0.0, 0.002, 0.001), 0.004, 3.0),
    RooflineCost(1e10, 1e12, 5e7, 2.6e7, 2e4, 1e4, 0.0002),
)
NUM_REQUESTS = 24
NUM_CONFIGURATIONS = int(os.environ.get("SIMULATOR_CONFIGURATIONS", "32"))
INFO = {
    "backend": "torch", "model": "m", "device": "cpu", "dtype": "bf16", "vocab_size": 9, "eos_token_ids": (),
    "max_batch_size": 16, "max_model_len": 4096, "computes_padding": True,
}  # fmt: skip


def made_schedule(draw: random.Random, num_requests: int) -> Schedule:
    prompts = [
        Prompt(
            id=f"p{i}",
            prompt=tuple([1] * draw.randint(1, 120)),
            max_tokens=draw.choice([1, 2, 9, 40, 90]),
            user=draw.choice([None, "a", "b"]),
            priority=draw.choice([None, 0, 2]),
        )
        for i in range(num_requests)
    ]
    is_open = draw.random() < 0.5
    rate = draw.choice([2.0, 10.0, 60.0]) if is_open else None
    arrivals = draw.choice(["poisson", "constant"]) if is_open else None
    load = make_load(concurrency=draw.randint(1, 20), rate=rate, arrivals=arrivals)
    return make_schedule(prompts, num_requests, load, draw.randint(0, 99))


def simulated(seed: int, *, exact: bool) -> Simulated:
    draw = random.Random(seed)
    schedule = made_schedule(draw, NUM_REQUESTS)
    max_batch = draw.choice([1, 3, 8, 16])
    own = {
        "MAX_BATCH": str(max_batch), "ORDER": draw.choice(list(ORDERS)),
        "STEP_LAYOUT": draw.choice(list(LAYOUTS)),
        "PAD_FINISHED": draw.choice("01"), "PREFILL_CHUNK": "16",
        "MAX_STEP_TOKENS": draw.choice(["32", "200"]),
        "KV_POLICY": draw.choice(list(KV_POLICIES)),
        "BATCH_WAIT_MS": draw.choice(["0", "30"]), "SCHEDULE_TICK_MS": draw.choice(["0", "0", "0", "9"]),
    }  # fmt: skip
    calibration = Calibration(
        name="made up", source="test", cost=draw.choice(COSTS), base={"BACKEND": "torch"},
        info={**INFO, "kv_capacity_tokens": draw.choice([300, 16 * 4096])},
        overheads=draw.choice([Overheads(), Overheads(0.0003, 1e-6, 0.0004, 0.0002, 0.0008, 1e-5)]),
    )  # fmt: skip
    if isinstance(calibration.cost, NullCost):
        own["MAX_MODEL_LEN"] = "512"
    own |= {
        "ADMISSION": draw.choice(list(ADMISSIONS)), "LENGTH_ORACLE": draw.choice(["max_tokens", "0.5"]),
        "LONG_PREFILL_TOKEN_THRESHOLD": draw.choice(["0", "40"]),
    }  # fmt: skip
    if (own["KV_POLICY"], own["ORDER"]) == ("paged", "fcfs"):
        own["PRIORITY_PREEMPTION"] = draw.choice("01")
    if own["PAD_FINISHED"] == "1" and own["KV_POLICY"] == "reserve":
        own["PAD_STYLE"] = draw.choice(["lean", "generate"])
    own |= {"MAX_QUEUE": draw.choice(["2", "5", "256"]), "MAX_QUEUE_TOKENS": draw.choice(["150", "262144"])}
    options = FleetOptions(
        draw.choice([1, 1, 3]), draw.choice(list(ROUTERS)), draw.choice([0.0, 0.02]), seed, exact,
        cost_scales=draw.choice([(1.0,), (1.0, 2.5)]),
        failures=draw.choice([None, Failures(every_s=0.7, for_s=0.2)]),
        autoscaling=draw.choice([None, Autoscaling(2, most=4, every_s=0.1, down_window_s=0.3,
                                                   down_every_s=0.1, start_up_s=0.05)]),
    )  # fmt: skip
    return simulate(read_arm(draw.choice(list(VARIANTS)), own, calibration), calibration, schedule, options)


def of_requests(made: Simulated) -> dict[int, dict[str, Any]]:
    told = {}
    for flight in made.flights:
        timings = {e.name: getattr(flight.timings, e.name, None) for e in fields(SequenceTimings)}
        told[flight.planned.index] = {
            **timings, "chunk_s": flight.chunk_s, "sent_s": flight.sent_s, "finish_s": flight.finish_s,
            "replica": flight.replica, "error": flight.error,
        }  # fmt: skip
    return told


class Watching(Continuous):
    """Lets in as many as the progress of those that run tells it, whatever that means."""

    def admit(
        self, waiting: Seq[Sequence], running: Seq[Sequence], *, now_s: float, draining: bool
    ) -> Admission:
        progress = sum(
            len(seq.output_token_ids) + 2 * seq.num_computed_tokens + 3 * seq.num_steps + seq.sum_batch_rows
            for seq in running
        )
        return Admission(progress % 3 if running else 1)


@pytest.mark.parametrize("seed", range(NUM_CONFIGURATIONS))
def test_it_equals_the_exact_mode_request_by_request(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parent)
    exact, fast = simulated(seed, exact=True), simulated(seed, exact=False)
    told, expected = of_requests(fast), of_requests(exact)
    assert sorted(told) == sorted(expected) == list(range(NUM_REQUESTS))
    for index, values in expected.items():
        for name, value in values.items():
            found = told[index][name]
            is_number = value is not None and not isinstance(value, str)
            same = pytest.approx(value, rel=1e-9, abs=1e-9) if is_number else value
            assert found == same, name
    for one, other in zip(fast.fleet.steps, exact.fleet.steps, strict=True):
        assert isinstance(one, StepRecords)
        assert isinstance(other, StepRecords)
        assert len(one) == len(other)
        assert sum(s.num_dead_rows for s in one) == sum(s.num_dead_rows for s in other)
        for step, same in zip(one, other, strict=True):
            assert vars(step) == pytest.approx(vars(same), rel=1e-9, abs=1e-9)


def test_a_strategy_may_look_at_the_progress_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(VARIANTS, "continuous", Watching)
    info = {**INFO, "kv_capacity_tokens": 16 * 4096}
    calibration = Calibration(
        name="made up", source="test", info=info, cost=COSTS[2], base={"BACKEND": "torch"}
    )
    arm = read_arm("continuous", {"MAX_BATCH": "8"}, calibration)
    prompts = [Prompt(id=f"p{i}", prompt=(1,) * 20, max_tokens=10 + 7 * i % 60) for i in range(60)]
    schedule = make_schedule(prompts, 60, make_load(concurrency=12, rate=None, arrivals=None), 0)
    exact, fast = (
        of_requests(simulate(arm, calibration, schedule, FleetOptions(exact=is_exact)))
        for is_exact in (True, False)
    )
    assert fast == exact


def test_it_takes_fewer_events() -> None:
    prompts = [Prompt(id=f"p{i}", prompt=(1,) * 20, max_tokens=80 + i) for i in range(12)]
    schedule = make_schedule(prompts, 12, make_load(concurrency=4, rate=None, arrivals=None), 0)
    info = {**INFO, "kv_capacity_tokens": 16 * 4096}
    calibration = Calibration(
        name="made up", source="test", info=info, cost=COSTS[2], base={"BACKEND": "torch"}
    )
    arm = read_arm("continuous", {}, calibration)
    exact, fast = (
        simulate(arm, calibration, schedule, FleetOptions(exact=is_exact)).fleet.num_events
        for is_exact in (True, False)
    )
    assert fast < 0.4 * exact
