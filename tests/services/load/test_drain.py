"""SIGTERM while as many requests run as fit and as many again wait: each gets its whole answer."""

from __future__ import annotations

import asyncio
import signal

import pytest

from tests.services.load_client import Connection
from tests.services.served import CLIENT, DEADLINE_S, lab_serve


@pytest.mark.parametrize("variant", ["continuous", "static", "dynamic"])
def test_everything_accepted_is_finished(variant: str) -> None:
    with lab_serve(f"--variant={variant}", NULL_STEP_MS=10, MAX_BATCH=16) as lab:
        lab.wait_ready()
        port = int(lab.url.rsplit(":", 1)[1])

        async def scenario() -> list[tuple[bool, bool]]:
            asked = [
                asyncio.create_task(
                    Connection(port).post(prompt="x", max_tokens=60, ignore_eos=True, stream=True)
                )
                for _ in range(32)
            ]
            while CLIENT.get(lab.url + "/health").json()["active_requests"] < 32:  # noqa: ASYNC110
                await asyncio.sleep(0.005)
            lab.process.send_signal(signal.SIGTERM)
            replies = await asyncio.gather(*asked)
            return [(reply.is_whole, b'"num_output_tokens":60' in reply.body) for reply in replies]

        assert asyncio.run(scenario()) == [(True, True)] * 32
        assert lab.process.wait(DEADLINE_S) == 0
