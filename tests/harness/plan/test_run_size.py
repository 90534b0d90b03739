"""A run that nobody gave a number of requests is long enough to count on slow and fast machines."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.plan.corpus import Corpus, Prompt
from harness.plan.run_size import enough_requests, num_requests, pace_of, sizes_itself
from harness.settings import HarnessSettings

CORPUS = Corpus(tuple(Prompt(id=str(i), prompt="x", max_tokens=80) for i in range(500)), Path("c"), "s", "s")


@pytest.mark.parametrize(
    ("tokens_per_s", "expected"), [(1, 64), (300, 64), (434, 128), (1279, 256), (1281, 400), (50_000, 500)]
)
def test_about_15_seconds_or_enough_requests_and_the_corpus_once(tokens_per_s: float, expected: int) -> None:
    assert num_requests(tokens_per_s, CORPUS, HarnessSettings(concurrency=16)) == expected


@pytest.mark.parametrize("users", [1, 16, 24, 64])
def test_a_fast_machine_answers_enough_a_user_and_replays_the_corpus_again_for_it(users: int) -> None:
    found = num_requests(1e6, CORPUS, HarnessSettings(concurrency=users))
    assert found == max(500, 25 * users)
    assert found >= enough_requests(users)


def test_many_users_ask_four_times_each() -> None:
    assert num_requests(1, CORPUS, HarnessSettings(concurrency=100)) == 400


def test_what_is_given_stays() -> None:
    assert sizes_itself(HarnessSettings())
    for given in (
        {"requests": 64},
        {"rate": 2.0},
        {"url": "http://x"},
        {"shard": "0/2"},
        {"corpus": "synthetic:9x9"},
    ):
        assert not sizes_itself(HarnessSettings.model_validate(given)), given


def test_the_pace_of_short_answers_tells_that_of_long_ones() -> None:
    """24 prompts of 50 ms one after another, then tokens of 5 ms each: short answers are mostly prompts."""
    seconds = {num: 24 * (0.050 + num * 0.005) for num in (4, 16, 80)}
    pace = pace_of((4, seconds[4]), (16, seconds[16]))
    assert pace.seconds(80) == pytest.approx(seconds[80])
    assert 16 / seconds[16] < 0.7 * 80 / pace.seconds(80), "what 16 tokens alone would say"


@pytest.mark.parametrize("short", [(4, 2.0), (16, 0.5)])
def test_a_round_that_tells_nothing_new_counts_alone(short: tuple[float, float]) -> None:
    assert pace_of(short, (16, 1.6)).seconds(80) == pytest.approx(8.0)
