"""What a long prompt does to the tokens of others, cut into chunks and in one piece."""

from __future__ import annotations

import asyncio

import pytest

from tests.services.load_client import Connection, Ending, ms, quantile
from tests.services.served import lab_serve

pytestmark = pytest.mark.load
NUM_TALKERS = 8
LONG = [7] * 3500


def gaps_s(talkers: list[Ending], from_s: float, to_s: float) -> list[float]:
    """Between pieces of the same stream, those that fall at least partly into the time given."""
    return [
        later - earlier
        for talker in talkers
        for earlier, later in zip(talker.pieces_s, talker.pieces_s[1:], strict=False)
        if later > from_s and earlier < to_s
    ]


def measure(max_step_tokens: int) -> tuple[float, float, float, float]:
    """Longest gap with the long prompt, p99 without it; first token of the long and of a later short one."""
    with lab_serve(BACKEND="torch", MODEL="lab-26m", MAX_STEP_TOKENS=max_step_tokens) as lab:
        lab.wait_ready(deadline_s=120)  # a first start compiles
        port = int(lab.url.rsplit(":", 1)[1])

        async def ask(prompt: list[int] | str, max_tokens: int) -> Ending:
            return await Connection(port).post(
                prompt=prompt, max_tokens=max_tokens, ignore_eos=True, stream=True
            )

        async def scenario() -> tuple[list[Ending], Ending, Ending]:
            await ask(LONG, 1)  # first use of each shape
            talkers = [asyncio.create_task(ask(f"talker {i}", 550)) for i in range(NUM_TALKERS)]
            await asyncio.sleep(1.5)
            long = asyncio.create_task(ask(LONG, 1))
            await asyncio.sleep(0.05)
            short = asyncio.create_task(ask("short", 1))
            return await asyncio.gather(*talkers), await long, await short

        talkers, long, short = asyncio.run(scenario())
        assert all(ending.is_whole for ending in (*talkers, long, short))
        during = gaps_s(talkers, long.sent_s, long.end_s)
        before = gaps_s(talkers, long.sent_s - 1.0, long.sent_s)
        return max(during), quantile(before, 0.99), long.first_s - long.sent_s, short.first_s - short.sent_s


def test_chunks_keep_the_others_talking() -> None:
    longest = {}
    for max_step_tokens in (80, 256, 512, 4096):
        gap_s, calm_s, long_s, short_s = measure(max_step_tokens)
        longest[max_step_tokens] = gap_s
        print(
            f"\nMAX_STEP_TOKENS={max_step_tokens}: longest gap {ms(gap_s)} (p99 without it {ms(calm_s)});",
            end=" ",
        )
        print(f"first token of the long prompt {ms(long_s)}, of a short one after it {ms(short_s)}", end="")
    assert longest[80] < longest[4096] / 4
