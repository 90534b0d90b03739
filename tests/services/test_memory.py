"""Free memory goes back to the system."""

from __future__ import annotations

import asyncio
import platform

import psutil
import pytest

from services import memory
from services.memory import give_back

MIB = 1 << 20


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no such call")
def test_what_was_freed_below_something_used_is_given_back() -> None:
    process = psutil.Process()
    give_back()
    before = process.memory_info().rss
    blocks = [bytes(2000) for _ in range(60_000)]
    kept = blocks[::1000]
    del blocks
    give_back()
    assert len(kept) == 60
    assert process.memory_info().rss < before + 30 * MIB


def test_a_process_that_has_grown_is_looked_after(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "EVERY_S", 0.01)

    async def grow() -> bytes:
        given_back = asyncio.Event()
        loop = asyncio.get_running_loop()
        monkeypatch.setattr(memory, "give_back", lambda: loop.call_soon_threadsafe(given_back.set))
        task = asyncio.create_task(memory.keep_trimmed())
        await asyncio.sleep(0)  # it has looked once
        large = b"x" * (psutil.Process().memory_info().rss // 4)
        await asyncio.wait_for(given_back.wait(), 20)
        task.cancel()
        return large

    assert asyncio.run(grow())
