"""What the probe before a run takes for the speed of the server, whose clock is made up."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from adapters.base import LabError
from harness.client.connection import Origin
from harness.client.server import Server
from harness.client.target import Target
from harness.plan.corpus import Corpus, Prompt
from harness.replay import replay as module
from harness.replay.replay import Speed, measure_speed
from harness.settings import HarnessSettings
from tests.harness.fake_server import Answering, FakeServer, answer_all, json_response

USERS = 4
PROMPTS = [Prompt(id=str(n), prompt="x" * 100 * n, max_tokens=70 + 4 * n) for n in range(1, 5)]

CORPUS = Corpus(tuple(PROMPTS), Path("c"), "s" * 64, "s" * 64)
"""Of 80 tokens an answer."""


def probed(
    monkeypatch: pytest.MonkeyPatch,
    rounds_s: list[float],
    answer: Answering = answer_all,
    own: Sequence[int] = (),
) -> tuple[Speed, list[int]]:
    """The speed where the rounds take so long, and the budgets that were asked for."""
    instants = iter([instant for seconds in rounds_s for instant in (0.0, seconds)])
    monkeypatch.setattr(module, "perf_counter", instants.__next__)
    with FakeServer(answer) as server:
        target = Target(Origin("127.0.0.1", server.port), "/generate")
        settings = HarnessSettings(concurrency=USERS)
        found = measure_speed(Server(server.url, target, None, None), settings, CORPUS, own)
        bodies = [json.loads(body) for body in server.bodies]
        prompts = [str(body["prompt"]) for body in bodies]
        assert len(set(prompts)) == len(prompts), "no cache has seen a prompt before"
        assert {prompt.partition(" ")[2] for prompt in prompts} == {prompt.prompt for prompt in PROMPTS}
        return found, [body["max_tokens"] for body in bodies]


def test_a_slow_server_is_asked_for_few_tokens_and_their_prompts_count_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    speed, budgets = probed(monkeypatch, [9.0, 1.4, 2.6])
    assert budgets == [2] * USERS + [4] * USERS + [16] * USERS
    assert speed.tokens_per_s == pytest.approx(USERS * 80 / (1.0 + 80 * 0.1))
    assert speed.warm_up_s == pytest.approx(1.0 + 3.5 * 0.1), "4 requests of 2 to 5 tokens"
    assert speed.settling_s == pytest.approx(9.0 - (1.0 + 2 * 0.1))


def test_a_fast_server_is_asked_again_for_more(monkeypatch: pytest.MonkeyPatch) -> None:
    speed, budgets = probed(monkeypatch, [9.0, 0.05, 0.26, 0.74])
    assert budgets[-USERS:] == [64] * USERS
    assert speed.tokens_per_s == pytest.approx(USERS * 80 / (0.1 + 80 * 0.01))


def test_unequal_answers_have_a_speed_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    own = [2, 2, 2, 2, 2, 2, 2, 50]
    speed, budgets = probed(monkeypatch, [9.0, 1.4, 2.6, 5.0], own=own)
    assert sorted(budgets[-8:]) == own
    assert speed.unequal_tokens_per_s == pytest.approx(8 * 80 / (2.0 + 3.0 * 80 / 8))


def test_a_server_that_refuses_everything_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    async def refuse(body: dict[str, Any]) -> AsyncIterator[bytes]:
        yield json_response(500, {"error": {"message": "broken"}})

    with pytest.raises(LabError, match="warm-up requests failed"):
        probed(monkeypatch, [1.0], refuse)
