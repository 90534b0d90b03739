"""An engine that is killed again and again under load: every request ends, nothing leaks, it comes back."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections import Counter
from dataclasses import dataclass, field

import psutil
import pytest

from tests.services.engine_client.test_worker import engine_pid
from tests.services.load_client import Connection, Reply, ms
from tests.services.served import CLIENT, LabProcess, lab_serve

CONCURRENCY = 32


@dataclass
class Run:
    lab: LabProcess
    num_requests: int
    num_kills: int
    replies: list[Reply] = field(default_factory=list)
    kills_s: list[float] = field(default_factory=list)
    recoveries_s: list[float] = field(default_factory=list)
    num_begun: int = 0

    async def go(self) -> None:
        async with asyncio.timeout(240):
            await asyncio.gather(self._kill(), *(self._user(user) for user in range(CONCURRENCY)))

    async def _user(self, user: int) -> None:
        connection = Connection(int(self.lab.url.rsplit(":", 1)[1]))
        while self.num_begun < self.num_requests:
            self.num_begun += 1
            reply = await connection.post(
                prompt=f"user {user} asks once more", max_tokens=16, ignore_eos=True, stream=bool(user % 2)
            )
            self.replies.append(reply)
            if reply.status == 503 and reply.code != "engine_lost":
                await asyncio.sleep(1.0)  # as its Retry-After says
        connection.cut()

    async def _kill(self) -> None:
        for kill in range(1, self.num_kills + 1):
            while len(self.replies) < kill * self.num_requests // (self.num_kills + 1):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            os.kill(engine_pid(self.lab), signal.SIGKILL)
            self.kills_s.append(time.monotonic())
            await asyncio.sleep(0.5)  # the API has noticed by then
            while self.lab.status() != "ok":  # noqa: ASYNC110
                await asyncio.sleep(0.02)
            self.recoveries_s.append(time.monotonic() - self.kills_s[-1])


@pytest.mark.parametrize(
    ("num_requests", "num_kills", "settings"),
    [
        pytest.param(200, 2, {"NULL_STEP_MS": 2}, id="null"),
        pytest.param(1000, 3, {"BACKEND": "torch", "MODEL": "lab-26m"}, id="lab-26m", marks=pytest.mark.load),
    ],
)
def test_every_request_ends(num_requests: int, num_kills: int, settings: dict[str, object]) -> None:
    with lab_serve(LOG_LEVEL="WARNING", **settings) as lab:  # nobody reads its log meanwhile
        lab.wait_ready(deadline_s=120)  # a first start compiles
        api = psutil.Process(lab.process.pid)
        run = Run(lab, num_requests, num_kills)
        rss_before = api.memory_info().rss
        asyncio.run(run.go())

        counts = Counter(f"{reply.status} {reply.code}".strip() for reply in run.replies)
        ends_after_kill_s = [
            reply.end_s - killed_s
            for reply in run.replies
            for killed_s in run.kills_s
            if reply.sent_s < killed_s < reply.end_s and reply.code == "engine_lost"
        ]
        rss_growth = api.memory_info().rss / rss_before - 1
        print(f"\n{counts}; lost ones ended at most {ms(max(ends_after_kill_s))} after the kill;")
        print(f"recovered in {[round(s, 2) for s in run.recoveries_s]} s; API memory {rss_growth:+.1%}")

        assert len(run.replies) >= num_requests
        assert set(counts) <= {"200", "200 engine_lost", "503 engine_lost", "503 restarting"}
        assert all(reply.is_whole != (reply.code != "") or reply.status == 503 for reply in run.replies)
        assert len(run.recoveries_s) == num_kills
        assert max(ends_after_kill_s) < 1.0
        assert max(run.recoveries_s) < 10.0
        lab.wait_ready()
        health = CLIENT.get(lab.url + "/health").json()
        assert (health["status"], health["active_requests"], health["queue_depth"]) == ("ok", 0, 0)
        metrics = CLIENT.get(lab.url + "/metrics").text
        assert "lab_worker_restarts_total{" in metrics
        (usage,) = [line for line in metrics.splitlines() if line.startswith("lab_kv_cache_usage_ratio{")]
        assert usage.endswith(" 0.0")
