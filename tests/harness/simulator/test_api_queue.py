"""A simulated replica refuses whom the service would refuse, at the instant at which it would."""

from __future__ import annotations

from collections import Counter

import pytest

from harness.plan.corpus import Prompt
from harness.plan.load import make_load
from harness.plan.schedule import make_schedule
from harness.simulator.calibration import Calibration, null_calibration
from harness.simulator.costs import NullCost
from harness.simulator.fleet_spec import FleetOptions, Flight
from harness.simulator.overheads import Overheads
from harness.simulator.simulation import read_arm, simulate

FULL = "http 429: queue_full: The queue is full"


def calibration(overheads: Overheads) -> Calibration:
    return null_calibration().model_copy(
        update={"cost": NullCost(0.01, 0.0, 0.0), "overheads": overheads, "tokens_per_byte": 1.0}
    )


def played(
    own: dict[str, str],
    *,
    users: int,
    num: int = 12,
    num_bytes: int = 10,
    variant: str = "baseline",
    overheads: Overheads = Overheads(),  # noqa: B008 frozen
    replicas: int = 1,
    ramp_s: float | None = None,
) -> list[Flight]:
    known = calibration(overheads)
    prompts = [Prompt(id=f"p{i}", prompt="x" * num_bytes, max_tokens=5) for i in range(num)]
    load = make_load(concurrency=users, rate=None, arrivals=None, ramp_s=ramp_s)
    arm = read_arm(variant, {"MAX_MODEL_LEN": "512"} | own, known)
    return simulate(arm, known, make_schedule(prompts, num, load, 0), FleetOptions(replicas)).flights


def errors(flights: list[Flight]) -> Counter[str | None]:
    return Counter(flight.error for flight in flights)


def test_a_full_queue_refuses_and_its_user_asks_again() -> None:
    flights = played({"MAX_QUEUE": "2"}, users=3)
    assert errors(flights) == {None: 2, f"{FULL} (2 requests wait); try again in 1 s.": 10}
    assert errors(played({"MAX_QUEUE": "4"}, users=3)) == {None: 12}
    assert errors(played({}, users=3)) == {None: 12}


def test_each_replica_has_a_queue_of_its_own() -> None:
    assert errors(played({"MAX_QUEUE": "2"}, users=4, replicas=2))[None] == 12


def test_tokens_that_wait_are_limited_but_for_a_request_by_itself() -> None:
    told = errors(played({"MAX_QUEUE_TOKENS": "150"}, users=2, num_bytes=100))
    assert told == {None: 1, f"{FULL} (150 prompt tokens may wait); try again in 1 s.": 11}
    assert errors(played({"MAX_QUEUE_TOKENS": "150"}, users=1, num_bytes=200)) == {None: 12}


def test_prompts_that_wait_are_limited_but_for_a_request_by_itself() -> None:
    own = {"MAX_QUEUE": "6", "MAX_BATCH": "4"}
    assert errors(played(own, users=4, variant="static")) == {None: 12}
    told = errors(played(own, users=8, variant="static"))
    assert told == {None: 4, f"{FULL} (6 prompts may wait); try again in 1 s.": 8}


@pytest.mark.parametrize("accept_s", [0.0, 0.02])
def test_a_request_is_judged_when_the_api_gets_to_it(accept_s: float) -> None:
    """A burst that the API takes apart meets a queue that has moved on."""
    flights = played(
        {"MAX_QUEUE": "2", "MAX_BATCH": "16"}, users=6, num=6, variant="continuous",
        overheads=Overheads(accept_s=accept_s),
    )  # fmt: skip
    assert errors(flights)[None] == (6 if accept_s else 2)


@pytest.mark.parametrize(("ramp_s", "num_answered"), [(0.01, 1), (0.03, 2)])
def test_a_prompt_that_is_being_computed_waits_no_longer(ramp_s: float, num_answered: int) -> None:
    """Its first token comes with the third step, and another request during the first or the second one."""
    own = {"MAX_QUEUE": "1", "MAX_STEP_TOKENS": "32", "MAX_BATCH": "8"}
    flights = played(own, users=2, num=2, num_bytes=60, variant="continuous", ramp_s=ramp_s)
    assert errors(flights)[None] == num_answered
