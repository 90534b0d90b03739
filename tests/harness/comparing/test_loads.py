"""The loads of a comparison, the arms under each, and the capacity that is noted for a repeat."""

from __future__ import annotations

from pathlib import Path

import pytest

from adapters.base import ConfigError
from harness.comparing.loads import (
    default_arms,
    find_loads,
    load_settings,
    plan_load,
    with_defaults,
)
from harness.plan.load import parse_loads
from harness.replay.arm_file import Arm
from harness.settings import HarnessSettings

ARMS = [
    Arm("baseline", "baseline"),
    Arm("static", "static", {"PAD_FINISHED": "1"}),
    Arm("static", "static PAD_FINISHED=0", {"PAD_FINISHED": "0"}),
    Arm("dynamic", "dynamic", {"PAD_FINISHED": "1"}),
    Arm("dynamic", "dynamic PAD_FINISHED=0", {"PAD_FINISHED": "0"}),
    Arm("dynamic", "dynamic BATCH_WAIT_MS=0", {"BATCH_WAIT_MS": "0", "PAD_FINISHED": "1"}),
    Arm("continuous", "continuous"),
]


def settings(**given: object) -> HarnessSettings:
    return HarnessSettings.model_validate(given)


def test_by_default_a_closed_and_an_open_loop() -> None:
    assert find_loads(settings()) == [None, 0.75]
    assert find_loads(settings(concurrency=8)) == [None, 0.75]
    assert find_loads(settings(loads="closed,0.5 0.8")) == [None, 0.5, 0.8]


@pytest.mark.parametrize("given", [{"rate": 2.0}, {"trace": "t.csv"}, {"arrivals": "poisson", "rate": 1}])
def test_a_load_that_is_named_is_the_only_one(given: dict[str, object]) -> None:
    assert find_loads(settings(**given)) == [None]
    with pytest.raises(ConfigError, match="LOADS and"):
        find_loads(settings(loads="closed", **given))


@pytest.mark.parametrize("text", ["", "open", "0", "-1", "closed closed", "0.5 0.50", "nan", "inf", "11"])
def test_loads_that_make_no_sense(text: str) -> None:
    with pytest.raises(ConfigError, match="LOADS"):
        parse_loads(text)


def test_more_users_than_slots_and_few_requests_where_it_is_quick() -> None:
    plain, quick = with_defaults(settings()), with_defaults(settings(quick=True))
    assert (plain.concurrency, plain.requests, quick.requests) == (24, 64, 48)
    given = with_defaults(settings(quick=True, requests=9, concurrency=3))
    assert (given.concurrency, given.requests) == (3, 9)


def test_each_default_load_has_the_arms_that_it_is_about() -> None:
    closed = [arm.name for arm in default_arms(ARMS, None, reference="baseline", pad_was_given=False)]
    assert closed == [arm.name for arm in ARMS if arm.name != "dynamic BATCH_WAIT_MS=0"]
    spread = [arm.name for arm in default_arms(ARMS, 0.75, reference="baseline", pad_was_given=False)]
    assert spread == ["baseline", "static", "dynamic", "dynamic BATCH_WAIT_MS=0", "continuous"]
    unpadded = "static PAD_FINISHED=0"
    told = default_arms(ARMS, 0.75, reference=unpadded, pad_was_given=False)
    assert unpadded in [arm.name for arm in told], "ratios refer to it"


def test_one_capacity_gives_one_plan_with_a_draw_for_each_block(tmp_path: Path) -> None:
    def planned(capacity: float, draws: str = "new") -> list[str]:
        asked = load_settings(0.75, settings(capacity=capacity, draws=draws))
        made = plan_load(ARMS, asked, 3, tmp_path, resume=False, allow_changed_corpus=False)
        assert made.settings.rate == pytest.approx(0.75 * capacity, rel=0.005)
        assert {schedule.num_blocks for schedule in made.schedules} == {3}
        return [schedule.digest for schedule in made.schedules]

    assert planned(5.87) == planned(5.87)
    assert len(set(planned(5.87))) == 3
    assert set(planned(5.87)).isdisjoint(planned(6.5))
    assert len(set(planned(5.87, draws="same"))) == 1
