"""What long prompts do to the tokens of others, cut into chunks and in one piece."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from statistics import median

import pytest

from tests.services.load_client import Connection, Reply, ms, quantile
from tests.services.served import lab_serve

pytestmark = pytest.mark.load
NUM_TALKERS = 16
NUM_LONG = 3
LONG = [7] * 2000


@dataclass(frozen=True)
class Felt:
    """In s: gaps between a talker's tokens without and with long prompts, and first tokens of others."""

    calm_s: list[float]
    during_s: list[float]
    long_s: float
    short_s: float

    @property
    def p99_ratio(self) -> float:
        return quantile(self.during_s, 0.99) / quantile(self.calm_s, 0.99)


def gaps_s(talkers: list[Reply], from_s: float, to_s: float) -> list[float]:
    """Between pieces of the same stream, those that fall at least partly into the time given."""
    return [
        later - earlier
        for talker in talkers
        for earlier, later in zip(talker.pieces_s, talker.pieces_s[1:], strict=False)
        if later > from_s and earlier < to_s
    ]


def measure(prefill_chunk: int, threshold: int) -> Felt:
    """Sixteen streams; after a while long prompts come, each when the one before has its first token."""
    settings = {
        "PREFILL_CHUNK": prefill_chunk,
        "LONG_PREFILL_TOKEN_THRESHOLD": threshold,
        "MAX_STEP_TOKENS": 512 if threshold else 4096,
        "MAX_BATCH": 20,
    }
    with lab_serve(BACKEND="torch", MODEL="lab-26m", **settings) as lab:
        lab.wait_ready(deadline_s=120)  # a first start compiles
        port = int(lab.url.rsplit(":", 1)[1])

        async def ask(prompt: list[int] | str, max_tokens: int) -> Reply:
            return await Connection(port).post(
                prompt=prompt, max_tokens=max_tokens, ignore_eos=True, stream=True
            )

        async def scenario() -> tuple[list[Reply], list[Reply], Reply]:
            await asyncio.gather(*(ask(LONG, 2) for _ in range(20)))  # first use of each shape and slot
            talkers = [asyncio.create_task(ask(f"talker {i}", 600)) for i in range(NUM_TALKERS)]
            await asyncio.sleep(2.0)
            first = asyncio.create_task(ask(LONG, 1))
            await asyncio.sleep(0.05)
            short = asyncio.create_task(ask("short", 1))
            long = [await first] + [await ask(LONG, 1) for _ in range(NUM_LONG - 1)]
            return await asyncio.gather(*talkers), long, await short

        talkers, long, short = asyncio.run(scenario())
        assert all(reply.is_whole for reply in (*talkers, *long, short))
        assert all(talker.end_s > long[-1].end_s for talker in talkers), "a talker fell silent too early"
        began_s = long[0].sent_s
        return Felt(
            gaps_s(talkers, began_s - 1.2, began_s),
            gaps_s(talkers, began_s, long[-1].end_s),
            long[0].first_s - long[0].sent_s,
            short.first_s - short.sent_s,
        )


def test_chunks_keep_the_others_talking() -> None:
    felt = {}
    for sizes in ((16, 256), (32, 256), (64, 256), (64, 4095), (64, 0)):
        felt[sizes] = found = measure(*sizes)
        calm, during = (quantile(gaps, 0.99) for gaps in (found.calm_s, found.during_s))
        print(
            f"\nPREFILL_CHUNK={sizes[0]} LONG_PREFILL_TOKEN_THRESHOLD={sizes[1]}: p99 gap {ms(calm)} without"
            f" long prompts, {ms(during)} with them ({found.p99_ratio:.2f}x), longest"
            f" {ms(max(found.during_s))}, median {ms(median(found.calm_s))} and {ms(median(found.during_s))};"
            f" first token of a long prompt {ms(found.long_s)}, of a short one after it {ms(found.short_s)}",
            end="",
        )
    assert felt[16, 256].p99_ratio < felt[64, 0].p99_ratio / 4
