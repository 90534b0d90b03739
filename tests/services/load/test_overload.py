"""Ten times more than the service can do: refusals are quick, what is admitted keeps its latency."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field

import pytest

from tests.services.load_client import Connection, Reply, ms, quantile
from tests.services.served import CLIENT, LabProcess, lab_serve

STEP_S, MAX_BATCH, NUM_TOKENS = 0.020, 16, 16
CAPACITY_PER_S = MAX_BATCH / (STEP_S * NUM_TOKENS)
MAX_QUEUE = 64
TTFT_BOUND_S = (MAX_QUEUE + 2 * MAX_BATCH) / CAPACITY_PER_S
"""What waits before one that is just admitted and a batch that has just begun, at the full rate."""


@dataclass
class OpenLoop:
    """Requests at a constant rate, each over a connection that is free; stamps count from the schedule."""

    lab: LabProcess
    rate_per_s: float
    during_s: float
    _free: list[Connection] = field(default_factory=list)

    async def go(self) -> list[tuple[float, Reply]]:
        begin_s = time.monotonic() + 0.1
        asked = []
        for number in range(int(self.rate_per_s * self.during_s)):
            scheduled_s = begin_s + number / self.rate_per_s
            if (left_s := scheduled_s - time.monotonic()) > 0:
                await asyncio.sleep(left_s)
            asked.append(asyncio.create_task(self._one(scheduled_s)))
        return list(await asyncio.gather(*asked))

    async def _one(self, scheduled_s: float) -> tuple[float, Reply]:
        connection = self._free.pop() if self._free else Connection(int(self.lab.url.rsplit(":", 1)[1]))
        reply = await connection.post(
            prompt="hello there", max_tokens=NUM_TOKENS, ignore_eos=True, stream=True
        )
        self._free.append(connection)
        return scheduled_s, reply


def measure(lab: LabProcess, load: float, during_s: float) -> tuple[float, list[tuple[float, Reply]]]:
    """Goodput in requests a second at `load` times the capacity, and all replies."""
    rows = asyncio.run(OpenLoop(lab, load * CAPACITY_PER_S, during_s).go())
    good = [e for at_s, e in rows if e.status == 200 and e.is_whole and e.first_s - at_s <= TTFT_BOUND_S]
    last_s = max(e.end_s for _, e in rows if e.status == 200)
    goodput = len(good) / (last_s - rows[0][0])
    answered = [e for _, e in rows if e.status == 200]
    ttft_s = [e.first_s - at_s for at_s, e in rows if e.status == 200]
    print(f"\n{load:g}x capacity ({CAPACITY_PER_S:g}/s), {during_s:g} s: goodput {goodput:.1f}/s;", end=" ")
    print(f"{len(answered)} answered, {len(rows) - len(answered)} refused; p99 of ttft_sched", end=" ")
    print(f"{ms(quantile(ttft_s, 0.99))} (bound {ms(TTFT_BOUND_S)})", end="")
    return goodput, rows


@pytest.mark.parametrize("during_s", [pytest.param(3.0), pytest.param(60.0, marks=pytest.mark.load)])
def test_ten_times_the_capacity(during_s: float) -> None:
    settings = {"NULL_STEP_MS": STEP_S * 1000, "MAX_BATCH": MAX_BATCH, "MAX_QUEUE": MAX_QUEUE}
    with lab_serve(LOG_LEVEL="WARNING", **settings) as lab:
        lab.wait_ready()
        at_capacity, _ = measure(lab, 1.0, during_s)
        overloaded, rows = measure(lab, 10.0, during_s)

        refused = [reply for _, reply in rows if reply.status == 429]
        refusal_s = [reply.end_s - reply.sent_s for reply in refused]
        advice = sorted({int(reply.retry_after or 0) for reply in refused})
        print(
            f"; 429 after p50 {ms(quantile(refusal_s, 0.5))}, p99 {ms(quantile(refusal_s, 0.99))};", end=" "
        )
        print(f"Retry-After {advice} s")

        assert {reply.status for _, reply in rows} == {200, 429}
        assert all(reply.is_whole for _, reply in rows)
        assert all(1 <= seconds <= 10 for seconds in advice)
        assert overloaded >= 0.9 * at_capacity or during_s < 60
        assert quantile(refusal_s, 0.99) < (0.050 if during_s >= 60 else 1.0)
        assert CLIENT.get(lab.url + "/health").json()["active_requests"] == 0
