"""An engine that is killed or stopped at random moments, while it loads too, under mixed load.

LOSSES is how many kills and as many stops there are, LOSSES_SEED draws the moments. Pauses between restarts
are shortened, since after so many losses in a row they take 30 s each.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections import Counter

import psutil
import pytest

from tests.services.load_client import Connection, Reply
from tests.services.served import CLIENT, DEADLINE_S, lab_serve

SEED = int(os.environ.get("LOSSES_SEED", "1"))
NUM_USERS = 12
HEARTBEAT_TIMEOUT_S = 2.0
RECOVERY_S = 45.0
PROGRAM = (
    "-c",
    "from services.engine_client import supervisor; supervisor.MAX_PAUSE_S = 0.5\n"
    "import sys; from tools.cli import main; sys.exit(main())",
)
CLEAR = {"engine_lost", "engine_lost_twice", "restarting", "failed", "queue_full"}


class Run:
    """Users that ask without end, and one that takes the engine away from them."""

    def __init__(self, url: str, api: psutil.Process, rng: random.Random) -> None:
        self.replies: list[Reply] = []
        self.recoveries_s: list[float] = []
        self.while_loading = 0
        self._port = int(url.rpartition(":")[2])
        self._api = api
        self._rng = rng
        self._is_over = False

    async def go(self, num_each: int) -> None:
        users = [asyncio.create_task(self._user()) for _ in range(NUM_USERS)]
        deeds = [signal.SIGKILL, signal.SIGSTOP] * num_each
        self._rng.shuffle(deeds)
        for deed in deeds:
            await asyncio.sleep(self._rng.uniform(0.0, 1.5))
            await self._strike(deed)
        self._is_over = True
        await asyncio.gather(*users)

    async def _strike(self, deed: signal.Signals) -> None:
        began_s = time.monotonic()
        engine = await self._engine()
        is_loading = not self.replies or await self._health() != "ok"
        self.while_loading += is_loading
        engine.send_signal(deed)
        if (
            deed is signal.SIGSTOP and self._rng.random() < 0.5
        ):  # in time, too late, or to a process that is gone
            await asyncio.sleep(self._rng.uniform(0.0, 2 * HEARTBEAT_TIMEOUT_S))
            if engine.is_running():
                engine.send_signal(signal.SIGCONT)
        if self._rng.random() < 0.3:
            return  # the next one comes while it loads
        connection = Connection(self._port)
        while (await connection.post(prompt=f"{self._rng.random()}", max_tokens=2)).status != 200:
            assert time.monotonic() < began_s + RECOVERY_S, f"no good answer after {deed.name}"
            await asyncio.sleep(0.05)
        connection.cut()
        self.recoveries_s.append(time.monotonic() - began_s)

    async def _engine(self) -> psutil.Process:
        """The engine's process, which is not there in a pause."""
        while True:
            for child in self._api.children():
                if child.status() != psutil.STATUS_ZOMBIE and "spawn_main" in " ".join(child.cmdline()):
                    return child
            await asyncio.sleep(0.01)

    async def _health(self) -> str:
        return str(
            (await asyncio.to_thread(CLIENT.get, f"http://127.0.0.1:{self._port}/health")).json()["status"]
        )

    async def _user(self) -> None:
        connection = Connection(self._port)
        rng = self._rng
        while not self._is_over:
            text = f"{rng.random()} " * rng.choice([1, 1, 5, 40])
            chat = {"path": "/v1/chat/completions", "messages": [{"role": "user", "content": text}]}
            several = {"prompt": [text, text[::-1], "x"]}
            asked = rng.choice([chat, several, {"prompt": text}, {"prompt": text}])
            reply = await connection.post(
                **asked,
                max_tokens=rng.choice([1, 8, 40]),
                stream=rng.random() < 0.5,
                temperature=rng.random(),
            )
            self.replies.append(reply)
            if reply.status == 503:
                await asyncio.sleep(rng.uniform(0.0, 0.5))
            if rng.random() < 0.1:
                connection.cut()
        connection.cut()


@pytest.mark.parametrize(
    ("num_each", "settings"),
    [
        pytest.param(2, {"NULL_STEP_MS": 5}, id="short"),
        pytest.param(30, {"NULL_STEP_MS": 5}, id="null", marks=pytest.mark.load),
        pytest.param(10, {"BACKEND": "torch", "MODEL": "lab-26m"}, id="lab-26m", marks=pytest.mark.load),
    ],
)
@pytest.mark.timeout(1800)
def test_nothing_hangs_and_every_request_ends(num_each: int, settings: dict[str, object]) -> None:
    num_each = int(os.environ.get("LOSSES", num_each))
    rng = random.Random(SEED)
    with lab_serve(
        LOG_LEVEL="ERROR", HEARTBEAT_TIMEOUT_S=HEARTBEAT_TIMEOUT_S, program=PROGRAM, **settings
    ) as lab:
        lab.wait_ready(deadline_s=60)
        api = psutil.Process(lab.process.pid)
        run = Run(lab.url, api, rng)
        asyncio.run(run.go(num_each))

        counts = Counter(f"{reply.status} {reply.code}".strip() for reply in run.replies)
        longest_s = max(reply.end_s - reply.sent_s for reply in run.replies)
        print(f"\n{num_each} kills, {num_each} stops, {run.while_loading} while it loaded; {dict(counts)}")
        print(f"longest request {longest_s:.1f} s, longest recovery {max(run.recoveries_s):.1f} s")
        for reply in run.replies:
            assert reply.status, "no answer"
            assert reply.code in CLEAR if reply.code else reply.is_whole, (reply.status, reply.body)
        lab.wait_ready(RECOVERY_S)
        health = CLIENT.get(lab.url + "/health").json()
        assert (health["active_requests"], health["queue_depth"]) == (0, 0)
        children = api.children(recursive=True)
        assert sum("spawn_main" in " ".join(child.cmdline()) for child in children) == 1
        lab.process.terminate()
        assert lab.process.wait(DEADLINE_S) == 0
        assert not psutil.wait_procs(children, timeout=5)[1]
