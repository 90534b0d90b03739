"""Streams cut at random moments: their places are free within a tenth of a second, memory stays flat."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable

import psutil
import pytest

from tests.services.engine_client.test_worker import engine_pid
from tests.services.load_client import Connection, ms
from tests.services.served import CLIENT, LabProcess, lab_serve

LATEST_S = 0.1


async def cut_round(lab: LabProcess, num_streams: int, seed: int, during_s: float) -> list[float]:
    """Open streams, cut each at a random moment; for each sight of /health how late its count was."""
    rng = random.Random(seed)
    port = int(lab.url.rsplit(":", 1)[1])
    num_open = num_streams
    history: list[tuple[float, int]] = [(0.0, num_streams)]

    async def user(connection: Connection, cut_after_s: float) -> None:
        nonlocal num_open
        asking = asyncio.create_task(
            connection.post(prompt="x" * 200, max_tokens=3000, ignore_eos=True, stream=True)
        )
        await asyncio.sleep(cut_after_s)
        connection.cut()
        num_open -= 1
        history.append((time.monotonic(), num_open))
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)

    users = [
        asyncio.create_task(user(Connection(port), 1.5 + rng.random() * during_s)) for _ in range(num_streams)
    ]
    await until_active(lab, lambda active: active == num_streams)
    late_s: list[float] = []
    while num_open or late_s[-1] > 0:
        active = await asyncio.to_thread(lambda: CLIENT.get(lab.url + "/health").json()["active_requests"])
        # The count was right at some moment; how long has the next cut been done since?
        since = next((at_s for at_s, count in history if count < active), None)
        late_s.append(0.0 if since is None else time.monotonic() - since)
        assert late_s[-1] < 5.0, "streams were cut and their requests stay active"
        await asyncio.sleep(0.01)
    await asyncio.gather(*users)
    return late_s


async def until_active(lab: LabProcess, is_right: Callable[[int], bool]) -> None:
    end_s = time.monotonic() + 20
    while not is_right(CLIENT.get(lab.url + "/health").json()["active_requests"]):
        assert time.monotonic() < end_s
        await asyncio.sleep(0.02)


@pytest.mark.parametrize(
    ("num_streams", "num_rounds"), [(60, 2), pytest.param(500, 10, marks=pytest.mark.load)]
)
def test_cut_streams_free_their_places(num_streams: int, num_rounds: int) -> None:
    with lab_serve(NULL_STEP_MS=5, MAX_BATCH=32, MAX_QUEUE=1000, LOG_LEVEL="WARNING") as lab:
        lab.wait_ready()
        processes = [psutil.Process(pid) for pid in (lab.process.pid, engine_pid(lab))]
        rss: list[int] = []
        late_s: list[float] = []
        for number in range(num_rounds):
            late_s += asyncio.run(cut_round(lab, num_streams, number, 3.0))
            rss.append(sum(process.memory_info().rss for process in processes))
        growth = rss[-1] / rss[1] - 1  # a first round fills what is filled once
        print(f"\nlatest sight of a cut stream {ms(max(late_s))} after its cut ({len(late_s)} looks);")
        print(f"memory by round {[round(size / 1e6, 1) for size in rss]} MB, {growth:+.2%} since the second")
        if num_rounds > 2:
            assert growth < 0.02
        assert max(late_s) < (LATEST_S if num_rounds > 2 else 1.0)  # a busy machine may be late itself
