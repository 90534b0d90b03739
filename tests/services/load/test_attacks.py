"""One client does its worst beside eight streams: the others hardly notice, and it leaves nothing behind.

`ATTACK_S` and `REST_S` in the environment set how long an attack lasts and what comes after it (30 and 60 s).
"""

from __future__ import annotations

import asyncio
import itertools
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import psutil
import pytest

from tests.services.attackers import ATTACKS
from tests.services.load_client import Connection, Reply, ms, quantile
from tests.services.served import LabProcess, lab_serve

NUM_STREAMS = 8
ATTACK_S = float(os.environ.get("ATTACK_S", "30"))
REST_S = float(os.environ.get("REST_S", "60"))
MODEL = {"BACKEND": "torch", "MODEL": "lab-26m", "MAX_BATCH": 32, "MAX_TOKENS": 200}


@dataclass
class Watch:
    """Eight users with streams one after another, and a glance at /health twenty times a second."""

    port: int
    end_s: float
    gaps_s: list[float] = field(default_factory=list)
    health_s: list[float] = field(default_factory=list)
    replies: list[Reply] = field(default_factory=list)

    async def go(self) -> None:
        await asyncio.gather(self._look(), *(self._user() for _ in range(NUM_STREAMS)))

    async def _user(self) -> None:
        connection = Connection(self.port)
        while time.monotonic() < self.end_s:
            reply = await connection.post(prompt="hello there", ignore_eos=True, stream=True)
            self.replies.append(reply)
            self.gaps_s += [after - before for before, after in itertools.pairwise(reply.pieces_s)]
            if reply.status != 200:
                await asyncio.sleep(0.2)
        connection.cut()

    async def _look(self) -> None:
        while time.monotonic() < self.end_s:
            begin_s = time.monotonic()
            reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
            writer.write(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            head = await reader.read(100)
            self.health_s.append(time.monotonic() - begin_s)
            writer.close()
            assert head.startswith(b"HTTP/1.1 200"), head
            await asyncio.sleep(0.05)


def port_of(lab: LabProcess) -> int:
    return int(lab.url.rsplit(":", 1)[1])


@pytest.fixture(scope="module")
def lab() -> Iterator[LabProcess]:
    with lab_serve(LOG_LEVEL="ERROR", **MODEL) as lab:
        lab.wait_ready(deadline_s=120)
        # A first step of so many rows takes long, and a first long text takes memory that stays.
        asyncio.run(Connection(port_of(lab)).post(prompt=["hello there"] * 64, max_tokens=40))
        asyncio.run(Connection(port_of(lab)).post(prompt="hello there " * 3000, max_tokens=1))
        asyncio.run(Watch(port_of(lab), time.monotonic() + 3.0).go())
        yield lab


@pytest.mark.load
@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_stops_nobody(lab: LabProcess, name: str) -> None:
    port = port_of(lab)
    api = psutil.Process(lab.process.pid)
    before = api.memory_info().rss
    command = [sys.executable, "-m", "tests.services.attackers", name, str(port), str(ATTACK_S)]
    attacker = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    watch = Watch(port, time.monotonic() + ATTACK_S)
    try:
        asyncio.run(watch.go())
    finally:
        attacker.kill()
        num_rounds = len(attacker.communicate()[0].split())
    most = api.memory_info().rss
    time.sleep(REST_S)
    growth = api.memory_info().rss / before - 1
    good = asyncio.run(Connection(port).post(prompt="hello", max_tokens=4))
    answered = [reply for reply in watch.replies if reply.status == 200]
    refused = len(watch.replies) - len(answered)
    health_s, gap_s = quantile(watch.health_s, 0.99), max(watch.gaps_s, default=0.0)
    # The first line is a row of docs/reliability.md, but for what is sent.
    print(f"\n| `{name}` | | {ms(health_s)}, {ms(gap_s)}; {growth:+.1%} |")
    print(f"  {num_rounds} rounds, {len(answered)} streams, {refused} refused; ", end="")
    print(f"memory {most / before - 1:+.1%} at the end, the last figure {REST_S:g} s after")
    assert good.status == 200
    assert all(reply.is_whole for reply in answered)
    assert {reply.status for reply in watch.replies} <= {200, 429}
    assert health_s < 0.1
    assert gap_s < 0.5
    assert growth < 0.05
