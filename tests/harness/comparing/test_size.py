"""A comparison is sized by what its arms did when they were tried out: few requests, few arms, few blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from harness.comparing.loads import default_arms, fewer_arms
from harness.comparing.size import (
    QUICK_S,
    WHOLE_S,
    Size,
    SizedLoad,
    find_size,
    kind_of,
    noted,
    size_text,
    trial_budgets,
)
from harness.plan.corpus import Corpus, Prompt
from harness.plan.run_size import Trial
from harness.replay.arm_file import Arm
from harness.settings import HarnessSettings
from tests.harness.comparing.test_loads import ARMS

PROMPTS = [Prompt(id=str(i), prompt="x", max_tokens=10 if i % 4 else 290) for i in range(400)]
CORPUS = Corpus(tuple(PROMPTS), Path("c"), "s", "s")
SPEEDS = {"baseline": 1.0, "static": 1.5, "dynamic": 1.5, "continuous": 3.7}
START_S, WARM_UP_S = 5.0, 1.0


def found(
    tokens_per_s: float, *, is_given: bool = False, blocks: int | None = None, **given: object
) -> tuple[Size, list[Sequence[Arm]], list[str]]:
    """On a machine whose baseline makes so many tokens a second; the arms under each load, and those that
    were tried out."""
    tried: list[str] = []

    def try_out(arm: Arm, budgets: Sequence[int]) -> Trial:
        tried.append(str(arm.name))
        rate = tokens_per_s * SPEEDS[str(arm.variant)]
        return Trial(rate / 80, rate, START_S, WARM_UP_S)

    settings = HarnessSettings.model_validate({"concurrency": 24, **given})
    known = [arm for arm in ARMS if not (settings.quick and arm.settings.get("PAD_FINISHED") == "0")]
    loads = [
        (share, default_arms(known, share, reference="baseline", pad_was_given=False))
        for share in (None, 0.75)
    ]
    size = find_size(
        settings, loads, "baseline", CORPUS, try_out,
        is_given=is_given, asked_blocks=blocks, may_leave_out=True, started_s=0.0,
    )  # fmt: skip
    arms = [fewer_arms(own, share, size.left_out, "baseline") for share, own in loads]
    return size, arms, tried


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.comparing.size.perf_counter", lambda: 30.0)


def seconds_of(size: Size, arms: Sequence[Sequence[Arm]], tokens_per_s: float) -> float:
    """What the comparison takes, by the truth of `found`."""
    assert size.capacity is not None
    closed, spread = size.requests
    of_closed = sum(closed * 80 / (tokens_per_s * SPEEDS[str(arm.variant)]) for arm in arms[0])
    of_spread = len(arms[1]) * spread / (0.75 * size.capacity)
    services = {str(arm.name) for of_load in arms for arm in of_load}
    return size.num_blocks * (
        of_closed + of_spread + START_S * len(services) + WARM_UP_S * sum(map(len, arms))
    )


@pytest.mark.parametrize(
    ("tokens_per_s", "num_blocks", "left_out"),
    [
        (60, 1, 1),
        (135, 3, 3),
        (160, 3, 2),
        (190, 4, 3),
        (220, 4, 2),
        (260, 4, 1),
        (480, 4, 1),
        (1200, 4, 0),
        (5000, 4, 0),
        (100_000, 4, 0),
    ],
)
def test_both_loads_take_under_ten_minutes_on_slow_and_fast_machines(
    tokens_per_s: float, num_blocks: int, left_out: int
) -> None:
    size, arms, _ = found(tokens_per_s)
    assert (size.num_blocks, size.left_out) == (num_blocks, left_out)
    assert seconds_of(size, arms, tokens_per_s) <= WHOLE_S - 30
    closed, spread = size.requests
    assert closed >= 48, "every user asks twice"
    assert size.num_blocks * spread >= 60 or size.num_blocks == 1, "all blocks together have a p95"
    assert size.block_s == pytest.approx(seconds_of(size, arms, tokens_per_s) / num_blocks, rel=0.2)
    # Runs of all blocks together are long enough to count, or have enough requests.
    fastest_s = size.num_blocks * closed * 80 / (tokens_per_s * max(SPEEDS.values()))
    assert fastest_s > 10 or size.num_blocks * closed >= 25 * 24


def test_intervals_are_worth_more_than_the_last_arms_of_an_open_loop() -> None:
    size, arms, _ = found(135)
    assert size.num_blocks == 3
    assert [arm.name for arm in arms[0]] == ["baseline", "static", "dynamic", "continuous"]
    assert [arm.name for arm in arms[1]] == ["baseline", "dynamic", "continuous"]


def test_a_first_look_tries_out_the_reference_alone() -> None:
    assert found(180, quick=True, requests=48)[2] == ["baseline"]


@pytest.mark.parametrize("tokens_per_s", [180, 480, 5000])
def test_a_first_look_takes_under_three_minutes(tokens_per_s: float) -> None:
    size, arms, _ = found(tokens_per_s, quick=True, requests=48)
    assert size.num_blocks == 1
    assert seconds_of(size, arms, tokens_per_s) <= QUICK_S - 30


def test_more_blocks_take_more_time_and_have_the_same_requests() -> None:
    usual, more = found(480)[0], found(480, blocks=6)[0]
    assert more == replace(usual, num_blocks=6)


def test_a_slow_machine_is_told_what_it_does_without() -> None:
    size, arms, _ = found(60)
    loads = [SizedLoad(arms[0], None, ["static PAD_FINISHED=0"]), SizedLoad(arms[1], 0.5)]
    text = "\n".join(size_text(size, loads, "baseline", HarnessSettings(concurrency=24), size.num_blocks))
    assert text.startswith("plan: 1 block of 9 runs, about ")
    for words in (
        "24 users: 50 requests a block; baseline, static, dynamic, continuous",
        "0.5 requests/s: ",
        "CAPACITY=0.75 gives these rates again",
        "there is no ratio of p95 (REQUESTS=60 gives it)",
        "intervals need 3 blocks: --blocks 3 takes about ",
        "left out for time: static PAD_FINISHED=0 (--variants says which arms there are)",
    ):
        assert words in text


def test_each_kind_of_arm_is_tried_out_once() -> None:
    assert found(480)[2] == ["baseline", "static", "dynamic", "continuous"]
    assert kind_of(Arm("continuous", "c", {"MAX_BATCH": "8"})) != kind_of(Arm("continuous", "c"))


def test_a_number_that_is_given_stays_and_only_the_capacity_is_measured() -> None:
    size, _, tried = found(480, is_given=True, requests=9)
    assert (size.requests, size.num_blocks, size.block_s, size.capacity) == ([9, 9], 4, None, 6.0)
    assert tried == ["baseline"]
    assert found(480, is_given=True, requests=9, capacity=5.87)[2] == []


def test_trials_have_answers_as_unequal_as_the_corpus() -> None:
    budgets = trial_budgets(CORPUS, 48)
    assert len(budgets) == 48
    assert sum(budgets) / 48 == pytest.approx(16, rel=0.05)
    assert max(budgets) / min(budgets) == pytest.approx(29)


def test_a_noted_size_is_taken_by_resume_alone(tmp_path: Path) -> None:
    note, first, second = tmp_path / "x.size.json", found(480)[0], found(180)[0]
    assert noted(note, lambda: first, resume=True) == first
    assert noted(note, lambda: second, resume=True) == first
    assert noted(note, lambda: second, resume=False) == second
    whole = note.read_bytes()
    for damaged in (
        b"5.87",
        b"?",
        b"",
        b"\xff",
        whole.replace(b'"capacity": ', b'"capacity": -'),
        whole[:-9],
    ):
        note.write_bytes(damaged)
        assert noted(note, lambda: first, resume=True) == first
