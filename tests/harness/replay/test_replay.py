"""What the probe before a run takes for the speed of the server: tokens over the time that they took."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from adapters.base import LabError
from harness.client.connection import Origin
from harness.client.server import Server
from harness.client.target import Target
from harness.replay import replay as module
from harness.replay.replay import tokens_per_s
from harness.settings import HarnessSettings
from tests.harness.fake_server import Answering, FakeServer, answer_all, json_response

USERS = 4


def probed(
    monkeypatch: pytest.MonkeyPatch, instants_s: list[float], answer: Answering = answer_all
) -> tuple[list[float], list[int]]:
    """The rates, with a clock that shows these instants, and the budgets that were asked for."""
    monkeypatch.setattr(module, "perf_counter", iter(instants_s).__next__)
    with FakeServer(answer) as server:
        target = Target(Origin("127.0.0.1", server.port), "/generate")
        found = tokens_per_s(Server(server.url, target, None, None), HarnessSettings(concurrency=USERS))
        return found, [json.loads(body)["max_tokens"] for body in server.bodies]


def test_a_slow_server_is_asked_for_few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    rates, budgets = probed(monkeypatch, [0.0, 1.6])
    assert rates == pytest.approx([USERS * 16 / 1.6])
    assert budgets == [2] * USERS + [16] * USERS


def test_a_fast_server_is_asked_again_for_more_and_only_those_count(monkeypatch: pytest.MonkeyPatch) -> None:
    rates, budgets = probed(monkeypatch, [0.0, 0.1, 0.1, 0.5])
    assert rates == pytest.approx([USERS * 64 / 0.4])
    assert budgets == [2] * USERS + [16] * USERS + [64] * USERS


def test_a_server_that_refuses_everything_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    async def refuse(body: dict[str, Any]) -> AsyncIterator[bytes]:
        yield json_response(500, {"error": {"message": "broken"}})

    with pytest.raises(LabError, match="warm-up requests failed"):
        probed(monkeypatch, [0.0, 1.0], refuse)
