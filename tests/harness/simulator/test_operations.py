"""Failures, start-up, autoscaling, unequal replicas, routers by key, and brief rows."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from harness.plan.corpus import Prompt
from harness.plan.load import make_load
from harness.plan.schedule import Schedule, make_schedule
from harness.results.formulas import throughput
from harness.results.metrics import TPOT, TTFT, Figure
from harness.results.record import ReplayLabels, make_table, to_frame
from harness.results.steps import summarise_steps
from harness.simulator.brief import BriefRows
from harness.simulator.calibration import Calibration
from harness.simulator.costs import NullCost
from harness.simulator.fleet_spec import FleetOptions
from harness.simulator.operations import Autoscaler, Autoscaling, Failures
from harness.simulator.simulation import Simulated, make_rows, read_arm, simulate

INFO = {
    "backend": "torch", "model": "m", "device": "cpu", "dtype": "bf16", "vocab_size": 9, "eos_token_ids": (),
    "max_batch_size": 16, "max_model_len": 512, "kv_capacity_tokens": 16 * 512,
}  # fmt: skip
CALIBRATION = Calibration(
    name="made up", source="test", info=INFO, cost=NullCost(0.01, 0.001, 1e-5), base={"BACKEND": "torch"}
)
ARM = read_arm("continuous", {"MAX_MODEL_LEN": "512"}, CALIBRATION)


def schedule(rate: float = 20.0, num: int = 200) -> Schedule:
    prompts = [Prompt(id=f"p{i % 40}", prompt=(1,) * (20 + i), max_tokens=30 + i % 50) for i in range(num)]
    return make_schedule(prompts, num, make_load(concurrency=1, rate=rate, arrivals=None), 3)


def simulated(rate: float = 20.0, num: int = 200, **options: Any) -> Simulated:
    return simulate(ARM, CALIBRATION, schedule(rate, num), FleetOptions(**options))


def test_a_failure_cuts_what_has_begun_and_the_rest_is_asked_for_again() -> None:
    made = simulated(num_replicas=3, failures=Failures(every_s=4, for_s=1))
    errors = Counter(flight.error for flight in made.flights)
    assert len(made.flights) == 200
    assert set(errors) == {None, "its replica failed"}
    assert 0 < errors["its replica failed"] < 60
    for flight in made.flights:
        assert all(stamp_s <= flight.finish_s for stamp_s in flight.chunk_s)
        assert bool(flight.chunk_s)


def test_without_any_replica_requests_fail_at_once() -> None:
    made = simulated(num_replicas=1, failures=Failures(every_s=2, for_s=2))
    down = [flight for flight in made.flights if flight.error == "no replica was up"]
    assert down
    assert all(flight.replica == -1 and not flight.chunk_s for flight in down)


def test_the_same_seed_fails_at_the_same_instants() -> None:
    told = [
        [(flight.finish_s, flight.error) for flight in made.flights]
        for made in (simulated(num_replicas=2, failures=Failures(4, 1), seed=seed) for seed in (1, 1, 2))
    ]
    assert told[0] == told[1]
    assert told[0] != told[2]


def test_the_autoscaler_follows_the_formula_and_shrinks_slowly() -> None:
    scaler = Autoscaler(Autoscaling(target=12, most=8, down_window_s=300, down_every_s=60))
    assert scaler.num_replicas(0, 13, 1) == 1  # within the tolerance
    assert scaler.num_replicas(5, 25, 1) == 3
    assert scaler.num_replicas(10, 1000, 3) == 8
    assert scaler.num_replicas(15, 0, 8) == 8
    assert scaler.num_replicas(311, 0, 8) == 7
    assert scaler.num_replicas(316, 0, 7) == 7
    assert scaler.num_replicas(372, 0, 7) == 6


def test_an_autoscaled_fleet_grows_after_its_start_up_and_is_paid_for_as_long_as_it_runs() -> None:
    policy = Autoscaling(target=4, most=6, every_s=1, down_window_s=2, down_every_s=1, start_up_s=3)
    made = simulated(rate=30, num=400, num_replicas=1, autoscaling=policy)
    first_s = {index: min(f.sent_s for f in made.flights if f.replica == index) for index in range(2)}
    assert first_s[1] >= 4
    assert all(flight.error is None for flight in made.flights)
    fleet = made.fleet
    assert fleet.now_s < fleet.replica_s < len(fleet.replicas) * fleet.now_s
    alone = simulated(rate=30, num=400, num_replicas=1)
    assert alone.fleet.replica_s == pytest.approx(alone.fleet.now_s)
    assert alone.fleet.now_s > fleet.now_s


def test_a_slow_replica_gets_less_where_the_router_looks() -> None:
    options: dict[str, Any] = {"num_replicas": 2, "cost_scales": (1.0, 3.0)}
    shares = {
        router: Counter(f.replica for f in simulated(router=router, **options).flights)
        for router in ("round_robin", "least_outstanding")
    }
    assert shares["round_robin"][0] == shares["round_robin"][1]
    assert shares["least_outstanding"][0] > 1.5 * shares["least_outstanding"][1]


def test_a_session_is_a_user_where_there_is_one() -> None:
    prompts = [
        Prompt(id=f"p{i}", prompt=(1,) * 20, max_tokens=20, user=f"u{i % 9}" if i % 2 else None)
        for i in range(120)
    ]
    asked = make_schedule(prompts, 240, make_load(concurrency=1, rate=20.0, arrivals=None), 3)
    options = FleetOptions(num_replicas=4, router="session")
    replicas: dict[str, set[int]] = {}
    for flight in simulate(ARM, CALIBRATION, asked, options).flights:
        replicas.setdefault(flight.planned.user or flight.planned.prompt_id, set()).add(flight.replica)
    assert len(replicas) == 9 + 60
    assert all(len(each) == 1 for each in replicas.values())
    assert len(set.union(*replicas.values())) == 4


@pytest.mark.parametrize("router", ["session", "prefix"])
def test_equal_keys_go_to_one_replica(router: str) -> None:
    replicas: dict[object, set[int]] = {}
    for flight in simulated(rate=2, num_replicas=4, router=router).flights:
        key = flight.planned.prompt_id if router == "session" else flight.planned.prompt[:64]
        replicas.setdefault(key, set()).add(flight.replica)
    assert len(set().union(*replicas.values())) == 4
    num_kept = sum(len(used) == 1 for used in replicas.values())
    assert num_kept == len(replicas) if router == "session" else num_kept > 0.5 * len(replicas)


def test_brief_rows_have_the_figures_of_whole_ones() -> None:
    options: dict[str, Any] = {"num_replicas": 2, "router": "least_outstanding"}
    made, kept = simulated(**options), BriefRows(len(schedule().requests))
    brief = simulate(ARM, CALIBRATION, schedule(), FleetOptions(brief=True, **options), on_end=kept.add)
    rows = to_frame(make_table(make_rows(ReplayLabels("r", "continuous", "a", "b", "m", 0), made.flights)))
    for metric in (TTFT, TPOT):
        for q in (50, 95):
            figure = Figure(metric, q)
            assert figure.value(kept.frame(), True) == pytest.approx(figure.value(rows, True), rel=1e-6)
    found, expected = kept.throughput(is_open=True), throughput(rows, is_open=True)
    assert found is not None
    assert expected is not None
    assert found.requests_per_s == pytest.approx(expected.requests_per_s)
    assert found.output_tokens_per_s == pytest.approx(expected.output_tokens_per_s, rel=0.01)
    totals, whole = brief.fleet.totals, summarise_steps(made.steps, 0)
    assert whole is not None
    assert totals.num_steps == whole.num_steps
    assert totals.mean_batch_size == pytest.approx(whole.mean_batch_size)
    assert totals.dead_row_share == pytest.approx(whole.dead_row_share)


def test_users_that_begin_late_and_think_ask_for_everything() -> None:
    prompts = [Prompt(id=f"p{i}", prompt=(1,) * 20, max_tokens=10) for i in range(30)]
    load = make_load(concurrency=4, rate=None, arrivals=None, think_ms=200, ramp_s=2)
    made = simulate(ARM, CALIBRATION, make_schedule(prompts, 30, load, 0), FleetOptions())
    assert sorted(flight.planned.index for flight in made.flights) == list(range(30))
    assert sorted(flight.sent_s for flight in made.flights)[:1] == [0.0]
    assert {0.5, 1.0, 1.5} <= {round(flight.sent_s, 6) for flight in made.flights}
