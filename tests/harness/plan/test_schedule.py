"""Schedules: made of a seed alone, with the load that was asked for."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
import pytest

from adapters.base import ConfigError
from harness.plan.arrival_times import arrival_times
from harness.plan.corpus import Prompt
from harness.plan.schedule import Arrivals, Load, Schedule, make_load, make_schedule, schedule_digest

PROMPTS = [Prompt(id=f"p{i}", prompt=f"prompt {i}", max_tokens=i + 1) for i in range(50)]
CLOSED = Load(Arrivals.CLOSED, concurrency=4)
OPEN = Load(Arrivals.POISSON, rate=20.0)


def offsets(schedule: Schedule) -> list[float]:
    return [request.offset_s for request in schedule.requests if request.offset_s is not None]


def test_same_seed_same_schedule() -> None:
    assert make_schedule(PROMPTS, 40, OPEN, 7) == make_schedule(PROMPTS, 40, OPEN, 7)


def test_digest_is_stable_across_versions() -> None:
    assert make_schedule(PROMPTS, 40, CLOSED, 7).digest == GOLDEN_CLOSED
    assert make_schedule(PROMPTS, 40, OPEN, 7).digest == GOLDEN_OPEN


GOLDEN_CLOSED = "642121821d4ffc65a53f82f7c37cc990bb485d1dac460ff59b377cf7782454ec"
GOLDEN_OPEN = "6d0c779ab18e3c9fa16ff64b692c58588d9b4122875e3b30d438cc360e3d739e"


def test_digest_covers_every_planned_value() -> None:
    schedule = make_schedule(PROMPTS, 5, OPEN, 7)
    first = schedule.requests[0]
    entries = [(r.index, r.prompt_id, r.max_tokens, r.seed, r.offset_s) for r in schedule.requests]
    assert schedule_digest(OPEN, entries) == schedule.digest
    for changed in (
        (first.index, "other", first.max_tokens, first.seed, first.offset_s),
        (first.index, first.prompt_id, first.max_tokens + 1, first.seed, first.offset_s),
        (first.index, first.prompt_id, first.max_tokens, first.seed + 1, first.offset_s),
        (first.index, first.prompt_id, first.max_tokens, first.seed, 0.123),
    ):
        assert schedule_digest(OPEN, [changed, *entries[1:]]) != schedule.digest
    assert schedule_digest(replace(OPEN, rate=21.0), entries) != schedule.digest


def test_each_dimension_has_a_seed_of_its_own() -> None:
    closed, slow, fast = (
        make_schedule(PROMPTS, 40, load, 7) for load in (CLOSED, OPEN, Load(Arrivals.POISSON, rate=40.0))
    )
    assert len(set(closed.seeds.values())) == len(closed.seeds)
    for other in (slow, fast):
        assert [r.prompt_id for r in other.requests] == [r.prompt_id for r in closed.requests]
        assert [r.seed for r in other.requests] == [r.seed for r in closed.requests]
    np.testing.assert_allclose(np.array(offsets(slow)), 2 * np.array(offsets(fast)), rtol=1e-6)


def test_another_seed_changes_sampling_and_arrivals() -> None:
    one, two = make_schedule(PROMPTS, 40, OPEN, 1), make_schedule(PROMPTS, 40, OPEN, 2)
    assert [r.seed for r in one.requests] != [r.seed for r in two.requests]
    assert offsets(one) != offsets(two)


def test_prompts_come_in_the_order_of_the_corpus() -> None:
    ids = [prompt.id for prompt in PROMPTS]
    for seed in (3, 4):
        assert [r.prompt_id for r in make_schedule(PROMPTS, 120, CLOSED, seed).requests] == (3 * ids)[:120]


GOLDEN_DRAW = "232ea31f411de3a863574d9c5e633d8c4554adae6063daf0942ce20ccdcc5f8b"


def test_draws_of_one_seed_are_repeatable_samples_of_the_corpus() -> None:
    drawn = [make_schedule(PROMPTS, 20, OPEN, 7, draw=draw) for draw in range(3)]
    again = [make_schedule(PROMPTS, 20, OPEN, 7, draw=draw) for draw in range(3)]
    assert drawn == again
    assert drawn[0].digest == GOLDEN_DRAW
    plain = make_schedule(PROMPTS, 20, OPEN, 7)
    assert len({schedule.digest for schedule in [plain, *drawn]}) == 4
    for one, two in combinations([plain, *drawn], 2):
        assert {r.prompt_id for r in one.requests} != {r.prompt_id for r in two.requests}
        assert offsets(one) != offsets(two)
        assert {r.seed for r in one.requests}.isdisjoint({r.seed for r in two.requests})
    for schedule in drawn:
        assert len({r.prompt_id for r in schedule.requests}) == 20, "without replacement"
        assert np.mean(np.diff([0.0, *offsets(schedule)])) == pytest.approx(0.05, rel=0.6)


def test_think_times_have_a_seed_of_their_own_and_the_mean_asked_for() -> None:
    fixed = make_load(concurrency=4, rate=None, arrivals=None, think_ms=250.0, think="fixed")
    spread = make_load(concurrency=4, rate=None, arrivals=None, think_ms=250.0)
    plain = make_schedule(PROMPTS, 4000, CLOSED, 7)
    assert {r.think_s for r in make_schedule(PROMPTS, 40, fixed, 7).requests} == {0.25}
    thought = make_schedule(PROMPTS, 4000, spread, 7)
    assert thought == make_schedule(PROMPTS, 4000, spread, 7)
    times = np.array([r.think_s for r in thought.requests])
    assert times.mean() == pytest.approx(0.25, rel=0.05)
    assert times.std() == pytest.approx(0.25, rel=0.05)
    assert [(r.prompt_id, r.seed) for r in thought.requests] == [
        (r.prompt_id, r.seed) for r in plain.requests
    ]
    ramped = make_schedule(PROMPTS, 40, replace(CLOSED, ramp_s=2.0), 7)
    assert (
        len(
            {
                s.digest
                for s in (ramped, *(make_schedule(PROMPTS, 40, load, 7) for load in (CLOSED, fixed, spread)))
            }
        )
        == 4
    )


@pytest.mark.parametrize("given", [{"think_ms": 5.0}, {"ramp_s": 1.0}])
def test_users_of_an_open_loop_neither_think_nor_ramp(given: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="needs a closed loop"):
        make_load(concurrency=4, rate=2.0, arrivals=None, **given)
    with pytest.raises(ConfigError, match="THINK=fixed needs THINK_MS"):
        make_load(concurrency=4, rate=None, arrivals=None, think="fixed")


def test_a_draw_as_long_as_the_corpus_holds_each_prompt_once() -> None:
    ids = [r.prompt_id for r in make_schedule(PROMPTS, 100, CLOSED, 7, draw=1).requests]
    assert sorted(ids[:50]) == sorted(prompt.id for prompt in PROMPTS)
    assert ids[:50] == ids[50:] != [prompt.id for prompt in PROMPTS]


def test_poisson_gaps_have_the_mean_and_the_spread_of_an_exponential() -> None:
    load = Load(Arrivals.POISSON, rate=50.0)
    gaps = np.diff([0.0, *offsets(make_schedule(PROMPTS, 20_000, load, 11))])
    assert gaps.mean() == pytest.approx(0.02, rel=0.03)
    assert gaps.std() / gaps.mean() == pytest.approx(1.0, abs=0.03)
    # Nothing is clamped: the share of gaps above three means is that of an exponential.
    assert np.mean(gaps > 0.06) == pytest.approx(np.exp(-3), rel=0.1)
    assert gaps.min() > 0


def test_constant_arrivals_are_evenly_spaced() -> None:
    load = Load(Arrivals.CONSTANT, rate=4.0)
    assert offsets(make_schedule(PROMPTS, 5, load, 0)) == [0.0, 0.25, 0.5, 0.75, 1.0]


def test_closed_loop_has_no_offsets() -> None:
    assert offsets(make_schedule(PROMPTS, 5, CLOSED, 0)) == []


def test_seeds_fit_into_31_bits() -> None:
    assert all(0 <= r.seed < 2**31 for r in make_schedule(PROMPTS, 500, CLOSED, 5).requests)


def test_a_rate_makes_the_loop_open() -> None:
    assert make_load(concurrency=4, rate=None, arrivals=None) == CLOSED
    assert make_load(concurrency=4, rate=2.0, arrivals=None).arrivals is Arrivals.POISSON
    assert make_load(concurrency=4, rate=2.0, arrivals="constant").arrivals is Arrivals.CONSTANT


@pytest.mark.parametrize(
    ("concurrency", "rate", "arrivals", "named"),
    [
        (0, None, None, "CONCURRENCY"),
        (1, 0.0, None, "RATE"),
        (1, float("inf"), None, "RATE"),
        (1, None, "poisson", "RATE"),
        (1, 2.0, "bursty", "ARRIVALS"),
    ],
)
def test_impossible_loads_are_refused_by_name(
    concurrency: int, rate: float | None, arrivals: str | None, named: str
) -> None:
    with pytest.raises(ConfigError, match=named):
        make_load(concurrency=concurrency, rate=rate, arrivals=arrivals)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"rate": None, "arrivals": None, "cv": 2.0}, "CV=2 needs ARRIVALS=gamma"),
        ({"rate": 2.0, "arrivals": None, "cv": 2.0}, "CV=2 needs ARRIVALS=gamma"),
        ({"rate": 2.0, "arrivals": "gamma", "cv": 2.0, "on_s": 1.0}, "ON_S=1 needs ARRIVALS=onoff"),
        ({"rate": 2.0, "arrivals": "poisson", "off_s": 0.5}, "OFF_S=0.5 needs ARRIVALS=onoff"),
        ({"rate": 2.0, "arrivals": "constant", "rate_from": 0.0}, "RATE_FROM=0 needs ARRIVALS=ramp"),
    ],
)
def test_options_without_effect_are_refused(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        make_load(concurrency=1, **fields)


def test_no_requests_are_refused() -> None:
    with pytest.raises(ConfigError, match="REQUESTS"):
        make_schedule(PROMPTS, 0, CLOSED, 0)


NUM_DRAWS = 20_000


def gaps(load: Load, num: int = NUM_DRAWS, seed: int = 5) -> np.ndarray:
    return np.diff(np.array([0.0, *arrival_times(num, load, seed)]))


@pytest.mark.parametrize(
    ("load", "cv"),
    [
        (Load(Arrivals.POISSON, rate=50.0), 1.0),
        (Load(Arrivals.GAMMA, rate=50.0, cv=0.5), 0.5),
        (Load(Arrivals.GAMMA, rate=50.0, cv=1.0), 1.0),
        (Load(Arrivals.GAMMA, rate=50.0, cv=3.0), 3.0),
    ],
)
def test_mean_and_spread_are_those_of_the_distribution(load: Load, cv: float) -> None:
    found = gaps(load)
    assert found.mean() == pytest.approx(1 / 50, rel=4 * max(cv, 0.3) / NUM_DRAWS**0.5)
    assert found.std() / found.mean() == pytest.approx(cv, rel=0.08)


def test_bursts_hold_the_mean_rate_and_nothing_comes_between_them() -> None:
    load = Load(Arrivals.ONOFF, rate=20.0, on_s=1.0, off_s=3.0)
    times = np.array(arrival_times(4000, load, 3))
    assert (times % 4.0 <= 1.0).all()
    assert len(times) / times[-1] == pytest.approx(20, rel=0.05)


@pytest.mark.parametrize("start", [0.0, 10.0, 40.0])
def test_a_ramp_goes_where_it_should(start: float) -> None:
    load = Load(Arrivals.RAMP, rate=20.0, rate_from=start)
    times = np.array(arrival_times(8000, load, 3))
    assert (np.diff(times) >= 0).all()
    length_s, quarter_s = 400.0, 100.0
    first = float((times < quarter_s).sum()) / quarter_s
    last = float(((times >= length_s - quarter_s) & (times < length_s)).sum()) / quarter_s
    slope = (40.0 - 2 * start) / length_s
    assert first == pytest.approx(start + slope * quarter_s / 2, rel=0.1, abs=0.5)
    assert last == pytest.approx(start + slope * (length_s - quarter_s / 2), rel=0.1, abs=0.5)


def test_shapes_are_in_the_digest() -> None:
    one, two = (Load(Arrivals.GAMMA, rate=5.0, cv=cv) for cv in (1.0, 2.0))
    assert schedule_digest(one, []) != schedule_digest(two, [])
    assert one.shape == {"cv": 1.0}


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"arrivals": "gamma"}, "CV"),
        ({"arrivals": "onoff", "on_s": 1.0}, "OFF_S"),
        ({"arrivals": "ramp", "rate_from": 9.0}, "RATE_FROM"),
        ({"arrivals": "trace"}, "TRACE="),
    ],
)
def test_a_shape_needs_its_numbers(fields: dict[str, Any], name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        make_load(concurrency=1, rate=4.0, **fields)
