"""A run that nobody gave a number of requests lasts about 15 s on slow and fast machines."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.plan.corpus import Corpus, Prompt
from harness.plan.run_size import num_requests, sizes_itself
from harness.settings import HarnessSettings

CORPUS = Corpus(tuple(Prompt(id=str(i), prompt="x", max_tokens=80) for i in range(500)), Path("c"), "s", "s")


@pytest.mark.parametrize(
    ("tokens_per_s", "expected"), [(1, 64), (300, 64), (434, 128), (1544, 320), (50_000, 500)]
)
def test_about_15_seconds_and_the_corpus_once(tokens_per_s: float, expected: int) -> None:
    assert num_requests(tokens_per_s, CORPUS, HarnessSettings(concurrency=16)) == expected


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
