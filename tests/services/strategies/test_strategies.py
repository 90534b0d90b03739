"""Each strategy's answers as a table, and what they make of the same traffic on a virtual clock."""

from __future__ import annotations

from dataclasses import replace

import pytest

from adapters.base import ConfigError, SamplingParams, Sequence
from services.strategies import VARIANTS, resolve_variant
from services.strategies.base import Admission, StrategyConfig
from tests.services.virtual_lab import LIMITS, VirtualLab

CONFIG = StrategyConfig(max_batch=4, batch_wait_s=0.050)


def queue(*waiting: tuple[int, float]) -> list[Sequence]:
    """Sequences from (group id, arrival) pairs."""
    return [
        Sequence(seq_id, [1], SamplingParams(), group_id=group_id, arrival_s=arrival_s)
        for seq_id, (group_id, arrival_s) in enumerate(waiting)
    ]


THREE = queue((1, 0.0), (1, 0.0), (2, 0.030))
MANY = queue(*((7, 0.0) for _ in range(9)))
NOBODY = queue()
ONE = queue((9, 0.0))


@pytest.mark.parametrize(
    ("variant", "waiting", "running", "now_s", "draining", "answer"),
    [
        ("baseline", THREE, NOBODY, 0.04, False, Admission(1)),
        ("baseline", THREE, ONE, 0.04, False, Admission(0)),
        ("baseline", THREE, ONE, 9.0, True, Admission(0)),
        ("static", THREE, NOBODY, 0.04, False, Admission(2)),
        ("static", THREE[2:], NOBODY, 0.04, False, Admission(1)),
        ("static", MANY, NOBODY, 0.04, False, Admission(4)),
        ("static", THREE, ONE, 9.0, True, Admission(0)),
        ("dynamic", THREE, NOBODY, 0.04, False, Admission(0, recheck_at_s=0.050)),
        ("dynamic", THREE[2:], NOBODY, 0.04, False, Admission(0, recheck_at_s=0.080)),
        ("dynamic", THREE, NOBODY, 0.05, False, Admission(3)),
        ("dynamic", THREE, NOBODY, 0.04, True, Admission(4)),
        ("dynamic", MANY, NOBODY, 0.0, False, Admission(4)),
        ("dynamic", MANY, ONE, 9.0, True, Admission(0)),
        ("continuous", THREE, NOBODY, 0.0, False, Admission(4)),
        ("continuous", THREE, ONE, 0.0, False, Admission(3)),
        ("continuous", MANY, MANY[:4], 0.0, False, Admission(0)),
    ],
)
def test_admission(
    variant: str,
    waiting: list[Sequence],
    running: list[Sequence],
    now_s: float,
    draining: bool,
    answer: Admission,
) -> None:
    strategy = VARIANTS[variant](CONFIG)
    assert strategy.admit(waiting, running, now_s=now_s, draining=draining) == answer


def test_dynamic_waits_for_the_oldest_wherever_it_stands() -> None:
    waiting = queue((1, 0.030), (2, 0.010), (3, 0.020))
    answer = VARIANTS["dynamic"](CONFIG).admit(waiting, [], now_s=0.04, draining=False)
    assert answer.recheck_at_s == pytest.approx(0.060)


def test_traits_of_the_four() -> None:
    expected = {
        "baseline": (False, False),
        "static": (True, True),
        "dynamic": (True, False),
        "continuous": (False, False),
    }
    traits = {name: (VARIANTS[name].keeps_finished_rows, VARIANTS[name].takes_groups) for name in expected}
    assert traits == expected


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        ("static", "static"),
        ("baseline_single", "baseline"),
        ("static_batch", "static"),
        ("dynamic_batch", "dynamic"),
        ("Continuous-Batch ", "continuous"),
    ],
)
def test_old_and_new_names(name: str, variant: str) -> None:
    assert resolve_variant(name) == variant


def test_an_unknown_name_is_answered_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"'magic'.*baseline, static, dynamic, continuous"):
        resolve_variant("magic")


# Two requests at second 0, of two prompts and of one, with budgets of 3, 1 and 2 tokens; one step a second.
# A live row is its sequence's letter, a dead row a dot.
@pytest.mark.parametrize(
    ("variant", "pad_finished", "steps"),
    [
        ("baseline", True, ["a", "a", "a", "b", "c", "c"]),
        ("static", True, ["ab", "a.", "a.", "c", "c"]),
        ("static", False, ["ab", "a", "a", "c", "c"]),
        ("dynamic", True, ["abc", "ac.", "a.."]),
        ("dynamic", False, ["abc", "ac", "a"]),
        ("continuous", True, ["abc", "ac", "a"]),
    ],
)
def test_who_shares_a_step(variant: str, pad_finished: bool, steps: list[str]) -> None:
    lab = VirtualLab(variant, limits=replace(LIMITS, pad_finished=pad_finished))
    lab.submit(3, 1)
    lab.submit(2)
    lab.run()
    assert [
        "".join("abc"[seq_id] for seq_id in live) + "." * len(dead) for live, dead in lab.batches
    ] == steps


def test_continuous_refills_a_slot_in_the_next_step() -> None:
    lab = VirtualLab("continuous", limits=replace(LIMITS, max_batch=2))
    lab.submit(1)
    lab.submit(3)
    lab.submit(2)
    lab.run()
    assert [live for live, _ in lab.batches] == [[0, 1], [1, 2], [1, 2]]


def test_dynamic_starts_when_the_oldest_has_waited_long_enough() -> None:
    lab = VirtualLab("dynamic", batch_wait_s=5.0)
    lab.submit(1)
    lab.now_s = 2.0
    lab.submit(1)
    plan = lab.step()
    assert (plan.chunks, plan.recheck_at_s) == ([], 5.0)
    lab.now_s = 5.0
    assert lab.step().num_rows == 2


def test_dynamic_does_not_wait_while_draining() -> None:
    lab = VirtualLab("dynamic", batch_wait_s=5.0)
    lab.submit(1)
    lab.scheduler.drain()
    assert lab.step().num_rows == 1


def test_static_runs_a_large_group_in_slices_that_nobody_interrupts() -> None:
    lab = VirtualLab("static")
    lab.submit(*[2] * 10, priority=0)
    lab.step()
    lab.submit(1, priority=2)
    lab.run()
    first_seen: dict[int, None] = {}
    for live, _ in lab.batches:
        first_seen |= dict.fromkeys(live)
    assert list(first_seen) == list(range(11))
    assert [len(live) for live, _ in lab.batches] == [4, 4, 4, 4, 2, 2, 1]


def test_a_group_that_has_not_begun_lets_a_higher_priority_pass() -> None:
    lab = VirtualLab("static")
    lab.submit(2)
    lab.step()
    lab.submit(1, 1, priority=0)
    lab.submit(1, 1, priority=2)
    lab.run()
    assert [live for live, _ in lab.batches] == [[0], [0], [3, 4], [1, 2]]
