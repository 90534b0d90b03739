"""A run that nobody gave a number of requests is long enough to count on slow and fast machines."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.plan.corpus import Corpus, Prompt
from harness.plan.run_size import enough_requests, num_requests, sizes_itself
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
